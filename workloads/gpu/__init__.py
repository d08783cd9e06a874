"""Programs for a GPU, compiled and read on a machine without one."""
