"""vidbench: which architecture and which kernel for this clip length, batch size and machine."""

__version__ = "0.1.0"
