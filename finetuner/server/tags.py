"""Tags that the server puts on Documents."""

from __future__ import annotations

# why a Document has no embedding
ERROR_TAG = 'finetuner_error'
# which model embedded it, for the Executor behind the encoder: Jina hands it nothing else
MODEL_TAG = 'finetuner_model'
