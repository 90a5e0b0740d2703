"""Collections of image/label pairs: kept, shared, found and fed to training."""
