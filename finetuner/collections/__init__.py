"""Collections of image/label pairs: kept, shared, found and fed to training."""

from finetuner.collections.datapoint import DataPoint
from finetuner.collections.raster import Raster
from finetuner.collections.training_set import TrainingSet, VedaCollection, search

__all__ = ['DataPoint', 'Raster', 'TrainingSet', 'VedaCollection', 'search']
