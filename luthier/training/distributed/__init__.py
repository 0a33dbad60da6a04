"""What the processes of a run share: sums, batches, engines, and the news of each other."""
