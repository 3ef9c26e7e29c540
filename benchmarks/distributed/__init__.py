"""Several devices and several processes: work, memory, bytes sent."""
