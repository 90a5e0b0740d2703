"""What happens inside the encoding service, told to whoever measures it."""

from __future__ import annotations


class EncodingObserver:
    """Hears what happens; does nothing with it. Override what you want to know.

    Methods are called from several threads, must return at once and must not raise.
    """

    def queue_changed(self, num_documents: int) -> None:
        """So many Documents wait: not read yet, or read and not embedded yet."""

    def documents_read(self, num_documents: int, num_failed: int, seconds: float) -> None:
        """Contents were decoded or tokenised; `seconds` is the time of all together."""

    def batch_embedded(self, model: str, num_documents: int, seconds: float) -> None:
        """A batch went through a model; `model` is an artifact id or a pretrained model's name."""

    def request_refused(self, reason: str) -> None:
        """A request was not taken: `queue`, `deadline` or `size`."""

    def model_loaded(self, model: str, seconds: float, num_bytes: int) -> None:
        """A model was loaded and has answered once; `num_bytes` is what it takes of memory."""

    def model_dropped(self, model: str) -> None:
        """A model was let go of: replaced, or the least recently used."""

    def model_asked(self, model: str, is_loaded: bool) -> None:
        """A request named a model, which was in memory already, or must be loaded first."""
