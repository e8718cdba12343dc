"""Attack a ZePAD with the Adversarial Robustness Toolbox. Needs: pip install adversarial-robustness-toolbox."""

import torch
from art.attacks.evasion import ProjectedGradientDescentPyTorch
from art.estimators.classification import PyTorchClassifier

from zepad_mm import ZePAD
from zepad_mm.data import load_embedded

model = ZePAD.from_pretrained("embedded")
images, labels = load_embedded("test", n=8)
classifier = PyTorchClassifier(
    model, torch.nn.CrossEntropyLoss(), tuple(images.shape[1:]), len(model.class_names), clip_values=(0.0, 1.0)
)
attack = ProjectedGradientDescentPyTorch(classifier, eps=4 / 255, eps_step=1 / 255, max_iter=5, verbose=False)
adversarial = attack.generate(images.numpy(), labels.numpy())
print("accuracy", float((classifier.predict(adversarial).argmax(-1) == labels.numpy()).mean()))
