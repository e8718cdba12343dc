"""Attack a ZePAD with adv-lib. Needs: pip install adv-lib (its visdom builds with setuptools below 80 only)."""

import torch
from adv_lib.attacks.auto_pgd import apgd

from zepad_mm import ZePAD
from zepad_mm.data import load_embedded

model = ZePAD.from_pretrained("embedded").requires_grad_(False)
images, labels = load_embedded("test", n=8)
adversarial = apgd(model, images, labels, eps=4 / 255, norm=float("inf"), n_iter=5)
with torch.no_grad():
    print("accuracy", float((model(adversarial).argmax(-1) == labels).float().mean()))
