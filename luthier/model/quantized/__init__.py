"""Weights of few bits: quantised while they are loaded, quantised before they were saved, or by GPTQ on export."""
