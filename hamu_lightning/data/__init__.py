"""Data of an existing project, parted by the ids of a request: what is retained, forgotten and held out."""

from hamu_lightning.data._unlearn_data import UnlearnData

__all__ = ["UnlearnData"]
