"""Programs for the TPU compiler on a machine without a TPU."""
