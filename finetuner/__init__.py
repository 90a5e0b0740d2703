"""Fine-tune embedding models on your own labelled data and serve them, on your own machines."""

from docarray import Document, DocumentArray

from finetuner import callback
from finetuner.account import (
    delete_alias,
    get_token,
    list_aliases,
    login,
    logout,
    pull_data,
    push_data,
    set_alias,
)
from finetuner.api import (
    build_model,
    cos_sim,
    create_experiment,
    create_run,
    create_training_run,
    delete_experiment,
    delete_experiments,
    delete_run,
    delete_runs,
    describe_models,
    display,
    embed,
    encode,
    fit,
    get_experiment,
    get_model,
    get_run,
    list_callbacks,
    list_experiments,
    list_model_options,
    list_models,
    list_runs,
    save,
)
from finetuner.dataset_encoding import encode_dataset

__version__ = '1.0.0.dev0'
__default_tag_key__ = 'finetuner_label'

__all__ = [
    'Document',
    'DocumentArray',
    'build_model',
    'callback',
    'cos_sim',
    'create_experiment',
    'create_run',
    'create_training_run',
    'delete_alias',
    'delete_experiment',
    'delete_experiments',
    'delete_run',
    'delete_runs',
    'describe_models',
    'display',
    'embed',
    'encode',
    'encode_dataset',
    'fit',
    'get_experiment',
    'get_model',
    'get_run',
    'get_token',
    'list_aliases',
    'list_callbacks',
    'list_experiments',
    'list_model_options',
    'list_models',
    'list_runs',
    'login',
    'logout',
    'pull_data',
    'push_data',
    'save',
    'set_alias',
]
