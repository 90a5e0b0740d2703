"""Divide a model whose first part is frozen: what never changes, and what is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node, Tracer
from torch.fx.node import map_arg

Values = torch.Tensor | Mapping[str, torch.Tensor]


class DivisionError(Exception):
    """A model cannot be divided; the message says why."""


class TrainedPart(torch.nn.Module):
    """What of a model is trained; it has the modules of the model, not copies."""

    def __init__(self, graph: GraphModule, names: list[str]) -> None:
        """Keep the graph.

        Args:
            graph: takes one tensor for each name.
            names: of the values that the frozen part gives.
        """
        super().__init__()
        self.graph = graph
        self._names = names

    def forward(self, values: Values) -> torch.Tensor:
        """Embed what the frozen part gave: a tensor, or several by their names."""
        if isinstance(values, torch.Tensor):
            return self.graph(values)
        return self.graph(*(values[name] for name in self._names))


@dataclass(frozen=True)
class DividedModel:
    """A model in two parts that share its modules.

    Attributes:
        frozen: takes the inputs of the model, gives a list of tensors.
        trained: takes what the frozen part gave.
        names: of those tensors.
    """

    frozen: GraphModule
    trained: TrainedPart
    names: list[str]


def divide_model(model: torch.nn.Module) -> DividedModel:
    """Divide a model where its first trainable parameter comes in.

    Follows the model's computation as torch.fx sees it: all that depends on a trainable parameter is
    trained, all else is frozen. Values that go from one to the other may be several, as around a
    residual connection.

    Args:
        model: maps a batch to embeddings.

    Raises:
        DivisionError: nothing comes before the first trainable parameter, or torch.fx cannot
            follow the model.
    """
    was_training = model.training
    # Of functions that are told whether they are in training the graph keeps what they were told.
    model.eval()
    try:
        graph = _FrozenLeaves().trace(model)
    except Exception as error:
        # whatever a forward method does with a value that is none yet
        raise DivisionError(f'torch.fx cannot follow the model: {error}') from error
    finally:
        model.train(was_training)
    trained: set[Node] = set()
    for node in graph.nodes:
        if _learns(model, node) or any(used in trained for used in node.all_input_nodes):
            trained.add(node)
    between = [
        node
        for node in graph.nodes
        if node not in trained
        and node.op != 'get_attr'
        and not _is_batch_size(node)
        and any(user in trained for user in node.users)
    ]
    _check(graph, trained, between)
    names = [node.name for node in between]
    return DividedModel(
        _frozen_part(model, graph, trained, between),
        TrainedPart(_trained_part(model, graph, trained, between), names),
        names,
    )


class _FrozenLeaves(Tracer):
    """Looks into modules only where something in them is trained."""

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        if super().is_leaf_module(m, module_qualified_name) or not any(True for _ in m.children()):
            return True
        return not any(parameter.requires_grad for parameter in m.parameters())


def _learns(model: torch.nn.Module, node: Node) -> bool:
    if node.op == 'call_module':
        module = model.get_submodule(str(node.target))
        return any(parameter.requires_grad for parameter in module.parameters())
    if node.op != 'get_attr':
        return False
    owner, _, name = str(node.target).rpartition('.')
    return bool(getattr(getattr(model.get_submodule(owner), name), 'requires_grad', False))


def _is_batch_size(node: Node) -> bool:
    """Whether it is `tensor.size(0)`, which the trained part can tell as well."""
    return (node.op, node.target, node.args[1:]) == ('call_method', 'size', (0,))


def _check(graph: Graph, trained: set[Node], between: list[Node]) -> None:
    if not any(node.op == 'output' for node in trained):
        raise DivisionError('nothing of the model is trained')
    if not between or any(node.op == 'placeholder' for node in between):
        raise DivisionError('the first layers of the model are trained')
    if any('training' in node.kwargs for node in trained):
        raise DivisionError('the model tells functions whether it is in training')


def _frozen_part(
    model: torch.nn.Module, graph: Graph, trained: set[Node], between: list[Node]
) -> GraphModule:
    part = Graph()
    copies: dict[Node, Node] = {}
    for node in graph.nodes:
        if node not in trained:
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output([copies[node] for node in between])
    return GraphModule(model, part)


def _trained_part(
    model: torch.nn.Module, graph: Graph, trained: set[Node], between: list[Node]
) -> GraphModule:
    part = Graph()
    copies = {node: part.placeholder(node.name) for node in between}
    for node in graph.nodes:
        if node.op == 'output':
            part.output(map_arg(node.args[0], copies.__getitem__))
        elif node not in trained and _is_batch_size(node):
            copies[node] = part.call_method('size', (copies[between[0]], 0))
        elif node in trained or (node.op == 'get_attr' and trained & set(node.users)):
            copies[node] = part.node_copy(node, copies.__getitem__)
    return GraphModule(model, part)
