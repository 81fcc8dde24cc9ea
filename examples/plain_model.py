"""Put AllSpark into your own model: a small plain PyTorch network, two training steps and a prediction.

python examples/plain_model.py
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from allspark_fast.kernels.upsample_argmax import upsample_argmax
from allspark_fast.kernels.upsample_cross_entropy import upsample_cross_entropy
from allspark_fast.model import AllSpark, AllSparkOptions

CLASSES, CROP, STRIDE, CHANNELS = 4, 64, 8, 32


class PlainModel(nn.Module):
    """An encoder of stride 8 and a pixel classifier, with the bottleneck between them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, CHANNELS, 4, stride=4),
            nn.GELU(),
            nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2, padding=1),
            nn.GELU(),
        )
        tokens = (CROP // STRIDE) ** 2
        self.allspark = AllSpark(CHANNELS, CLASSES, tokens, AllSparkOptions(memory_init="empty"))
        self.classifier = nn.Conv2d(CHANNELS, CLASSES, 1)

    def forward(self, images: Tensor, class_logits: Tensor | None = None, *, use_memory: bool = False) -> Tensor:
        """Map images (B, 3, H, W) to logits (B, K, H / 8, W / 8); in training the labeled half comes first."""
        deepest = self.encoder(images)
        rebuilt = self.allspark(deepest, class_logits, crop_size=images.shape[2:], use_memory=use_memory)
        return self.classifier(rebuilt)


def train_step(
    model: PlainModel, optimizer: torch.optim.Optimizer, images: Tensor, target: Tensor, unlabeled: Tensor
) -> float:
    """Train on labeled ``images`` with ``target`` and on as many ``unlabeled`` images, and return the loss."""
    # The pseudo-label pass: the model in eval mode labels the unlabeled images.
    with torch.no_grad():
        class_logits = model.eval()(unlabeled)
        pseudo_label, _ = upsample_argmax(class_logits, (CROP, CROP))
    # The training pass: unlabeled channels enter the memory, and labeled features are rebuilt from it.
    logits, unlabeled_logits = model.train()(torch.cat([images, unlabeled]), class_logits, use_memory=True).chunk(2)
    loss = (upsample_cross_entropy(logits, target) + upsample_cross_entropy(unlabeled_logits, pseudo_label)) / 2
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def main() -> None:
    """Train on noise labeled by its brightness, then predict."""
    torch.manual_seed(0)
    model = PlainModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(2):
        images, unlabeled = torch.rand(2, 2, 3, CROP, CROP)
        target = (CLASSES * F.avg_pool2d(images.mean(1), 9, 1, 4)).long().clamp(max=CLASSES - 1)
        print(f"step {step}: loss {train_step(model, optimizer, images, target, unlabeled):.3f}")
    with torch.no_grad():
        labels, confidence = upsample_argmax(model.eval()(images), (CROP, CROP))
    print(f"labels {tuple(labels.shape)}, mean confidence {confidence.mean():.2f}")


if __name__ == "__main__":
    main()
