"""The doors of transformers' native models: what people call, tried on a checkpoint. `test_doors.py` says what each one does.

A door asserts what comes out, or raises what the library or this package raises.
"""

from . import saving, training, using
from .place import Doors, Place

DOORS: Doors = using.DOORS | saving.DOORS | training.DOORS

__all__ = ["DOORS", "Place"]
