"""What a row is for each kind of example: one file per row plan. Stages pick one; the losses know nothing of rows."""
