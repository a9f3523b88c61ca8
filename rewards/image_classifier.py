"""Reward: does the image show its class? Judged by any image classifier of transformers or timm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from marval_rl.errors import nearest

from .classification_models import load_classification_model
from .network_reward import NetworkReward

SCORES = ("log_probability", "margin", "accuracy")
BY_NAMES = "names"

# How a user names classes of the model: an index, a name, or several that together make the class.
ModelClasses = int | str | list[int | str]


class ImageClassifier(NetworkReward):
    """How well the image shows its class, by a classifier that was trained on photographs, such as ImageNet's.

    Args:
        model: Folder or hub id of a transformers image classifier with its image processor ("timm/resnet50.a1_in1k"
            too), or "timm:NAME" for a network of timm with weights in a file.
        weights: For timm:NAME: the file, safetensors or a state_dict of tensors.
        score: "log_probability" of the class (default, <= 0); "margin": that minus the log-probability of the best
            other class; "accuracy": 1 where the class is the most probable one, else 0, and not differentiable.
        label_map: None: class_labels are the model's classes, as those of ImageNet are in their usual order. "names":
            the model's class of the same name, or with it among its synonyms ("tench, Tinca tinca"). A mapping: class
            name -> the model's class, by index or name, or a list whose probabilities add up.
        dtype, micro_batch_size, compile: As in `NetworkReward`.

    Images are resized, cut and normalised as the model's own settings say.

    Raises:
        ValueError: For an unknown score or class and for invalid arguments.
        CheckpointError: For files that are missing or cannot be loaded.
        RewardError: For "timm:" without timm.
    """

    def __init__(
        self,
        model: str,
        weights: str | None = None,
        score: str = "log_probability",
        label_map: str | Mapping[str, ModelClasses] | None = None,
        dtype: str = "float32",
        micro_batch_size: int | None = None,
        compile: bool = False,
    ) -> None:
        if score not in SCORES:
            raise ValueError(f"unknown score {score!r}; known: {', '.join(SCORES)}")
        loaded = load_classification_model(model, weights, dtype)
        super().__init__(loaded.network, loaded.preprocessing, dtype, micro_batch_size, compile)
        self.kind = score
        self.differentiable = score != "accuracy"
        self.num_classes = loaded.num_classes
        self._logits = loaded.logits
        self._synonyms = _synonyms(loaded.class_names)
        self._label_map = self._check_label_map(label_map)

    def __call__(
        self, *, images: Tensor, class_labels: Tensor, class_names: Sequence[str], **columns: object
    ) -> Tensor:
        """Score images [B, 3, H, W] in 0..1 against their classes (length B) -> float32 [B]."""
        if self._label_map is None:
            classes = [[self._check_index(label)] for label in class_labels.tolist()]
        elif self._label_map == BY_NAMES:
            classes = [[self._find(name)] for name in class_names]
        else:
            classes = [self._mapped(name) for name in class_names]
        targets = torch.zeros(len(images), self.num_classes, dtype=torch.bool)
        for row, indices in enumerate(classes):
            targets[row, indices] = True
        return self.score_in_portions(images, targets.to(images.device))

    def score(self, images: Tensor, targets: Tensor) -> Tensor:
        """Images [B, 3, H, W] and which of the model's classes make theirs, bool [B, N] -> [B]."""
        log_probs = self._logits(self.network, self.pixels(images)).to(images.dtype).log_softmax(dim=1)
        own = log_probs.masked_fill(~targets, -torch.inf).logsumexp(dim=1)
        if self.kind == "log_probability":
            return own
        if self.kind == "margin":
            return own - log_probs.masked_fill(targets, -torch.inf).amax(dim=1)
        return targets.gather(1, log_probs.argmax(dim=1, keepdim=True)).squeeze(1).to(images.dtype)

    def _check_label_map(self, label_map: str | Mapping[str, ModelClasses] | None) -> str | dict[str, list[int]] | None:
        """A mapping's classes as lists of the model's indices; None and "names" as they are."""
        if label_map is None:
            return None
        if isinstance(label_map, Mapping):
            return {name: self._resolve(name, classes) for name, classes in label_map.items()}
        if label_map != BY_NAMES:
            raise ValueError(
                f"label_map must be {BY_NAMES!r}, a mapping from class names to the model's classes, or null for "
                f"class_labels as they are, not {label_map!r}"
            )
        if not self._synonyms:
            raise ValueError(f"label_map {BY_NAMES!r}: this model does not name its classes; give a mapping to indices")
        return BY_NAMES

    def _resolve(self, name: str, classes: ModelClasses) -> list[int]:
        several = classes if isinstance(classes, list | tuple) else [classes]
        found = [self._find(each) if isinstance(each, str) else self._check_index(each) for each in several]
        if not 0 < len(set(found)) < self.num_classes:
            raise ValueError(
                f"label_map gives {name!r} {len(set(found))} of the model's {self.num_classes} classes: "
                "it must be one or more, but not all"
            )
        return found

    def _mapped(self, name: str) -> list[int]:
        if name not in self._label_map:
            raise ValueError(f"label_map does not contain the class {name!r}{nearest(name, self._label_map)}")
        return self._label_map[name]

    def _check_index(self, index: int) -> int:
        if type(index) is not int or not 0 <= index < self.num_classes:
            raise ValueError(
                f"the class label {index!r} is not one of the model's {self.num_classes} classes; "
                "map your classes to them by label_map"
            )
        return index

    def _find(self, name: str) -> int:
        """The model's one class of this name, whatever the case."""
        found = self._synonyms.get(name.lower(), [])
        if len(found) != 1:
            problem = f"{len(found)} classes of the model are called {name!r}"
            hint = f" ({', '.join(map(str, found))})" if found else nearest(name.lower(), self._synonyms)
            raise ValueError(f"{problem}{hint}; give its index by a mapping in label_map")
        return found[0]


def _synonyms(class_names: Sequence[str] | None) -> dict[str, list[int]]:
    """Every name of a class, in lower case -> the indices of the classes with that name."""
    synonyms: dict[str, list[int]] = {}
    for index, class_name in enumerate(class_names or []):
        lower = class_name.lower()
        for name in {lower, *(part.strip() for part in lower.split(","))}:
            synonyms.setdefault(name, []).append(index)
    return synonyms
