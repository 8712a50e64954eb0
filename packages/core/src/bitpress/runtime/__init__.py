"""What runs: devices, processes, memory, progress. It knows no model."""
