"""Jina's own exporters, kept from asking hosts on the internet and from printing."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetuner.excepts import ConfigError
from finetuner.server.exporting.plan import Plan

NETWORK = 'finetuner'
_CONFIG = 'jina.orchestrate.deployments.config'


def kubernetes_objects(plan: Plan, namespace: str) -> dict[str, list[dict[str, Any]]]:
    """What Jina writes for Kubernetes: objects by the name of the file they are in."""
    import yaml

    with _flow_of(plan) as flow, tempfile.TemporaryDirectory() as folder:
        flow.to_kubernetes_yaml(folder, namespace)
        return {
            path.stem: [each for each in yaml.safe_load_all(path.read_text()) if each]
            for path in sorted(Path(folder).rglob('*.yml'))
        }


def compose_services(plan: Plan) -> dict[str, dict[str, Any]]:
    """What Jina writes for Docker Compose: its services by name."""
    import yaml

    with _flow_of(plan) as flow, tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'compose.yml')
        flow.to_docker_compose_yaml(str(path), network_name=NETWORK)
        return yaml.safe_load(path.read_text())['services']


@contextmanager
def _flow_of(plan: Plan) -> Iterator[Any]:
    from jina import Flow
    from jina.orchestrate.deployments.config import docker_compose, k8s

    loud = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            # where Jina looks for the image of heads; the log level would go into every ConfigMap
            _changed(os.environ, 'JINA_GATEWAY_IMAGE', plan.image),
            _changed(os.environ, 'JINA_HUB_NO_IMAGE_REBUILD', '1'),
            _changed(os.environ, 'JINA_LOG_LEVEL', None),
            # both ask Docker Hub which versions of Jina there are, wait for it and drop the answer
            _changed(vars(k8s), 'get_base_executor_version', lambda: ''),
            _changed(vars(docker_compose), 'get_base_executor_version', lambda: ''),
        ):
            yield Flow.load_config(plan.flow)
    except (ValueError, TypeError) as error:
        raise ConfigError(f'Jina cannot export this Flow: {error}') from error
    finally:
        logging.disable(loud)


@contextmanager
def _changed(names: MutableMapping[str, Any], name: str, value: Any) -> Iterator[None]:
    """Give a name another value for a while; None takes it away."""
    missing = object()
    before = names.pop(name, missing)
    if value is not None:
        names[name] = value
    try:
        yield
    finally:
        names.pop(name, None)
        if before is not missing:
            names[name] = before
