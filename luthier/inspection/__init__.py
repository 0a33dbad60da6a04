"""Inspecting rows: terminal, HTML page, doctor, and the comparison with the model's own chat template."""
