"""The process and the machine: command lines, files, ranks, devices. Knows nothing of the other rooms."""
