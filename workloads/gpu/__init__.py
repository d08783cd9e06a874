"""What a machine without a GPU can know of programs for one."""
