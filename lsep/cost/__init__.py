"""What a training step costs: FLOPs, bytes, floors, rates and memory. Everything here is computed, nothing measured."""
