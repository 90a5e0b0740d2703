"""Collections of image/label pairs: kept, shared, found and fed to training."""

from finetuner.collections.class_folders import create_from_folder
from finetuner.collections.datapoint import DataPoint
from finetuner.collections.making import create_from_geojson
from finetuner.collections.raster import Raster
from finetuner.collections.training_set import TrainingSet, VedaCollection, search
from finetuner.collections.unpacking import create_from_archive

__all__ = [
    'DataPoint',
    'Raster',
    'TrainingSet',
    'VedaCollection',
    'create_from_archive',
    'create_from_folder',
    'create_from_geojson',
    'search',
]
