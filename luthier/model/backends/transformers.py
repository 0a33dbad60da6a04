"""Models of transformers with adapters of peft: the default."""

from luthier.model.backends import DEFAULT, Backend
from luthier.model.loading.merged import load_for_inference
from luthier.model.loading.training import load_for_training

BACKEND = Backend(name=DEFAULT, load_for_training=load_for_training, load_for_inference=load_for_inference)
