"""Attack a ZePAD with torchattacks. Needs: pip install --no-deps torchattacks."""

import torch
import torchattacks

from zepad_mm import ZePAD
from zepad_mm.data import load_embedded

model = ZePAD.from_pretrained("embedded").requires_grad_(False)
images, labels = load_embedded("test", n=8)
adversarial = torchattacks.APGD(model, eps=4 / 255, steps=5, loss="ce")(images, labels)
with torch.no_grad():
    print("accuracy", float((model(adversarial).argmax(-1) == labels).float().mean()))
