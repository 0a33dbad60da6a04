"""What is watched while a run goes on: numbers that are not finite, spikes of the loss, waiting, memory, life."""
