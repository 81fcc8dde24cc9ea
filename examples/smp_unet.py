"""Put AllSpark into a model of segmentation_models_pytorch, between the encoder and the decoder of a U-Net.

pip install segmentation-models-pytorch && python examples/smp_unet.py
"""

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from allspark_fast.model import AllSpark

CLASSES, CROP = 4, 64


class UnetWithAllSpark(nn.Module):
    """A U-Net whose deepest map is rebuilt from unlabeled channels."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = smp.Unet("resnet18", encoder_weights=None, classes=CLASSES)  # "imagenet" downloads weights
        self.allspark = AllSpark(self.unet.encoder.out_channels[-1], CLASSES, tokens=(CROP // 32) ** 2)

    def forward(self, images: Tensor, class_logits: Tensor | None = None, *, use_memory: bool = False) -> Tensor:
        """Map images (B, 3, H, W) to logits (B, K, H, W); in training the labeled half of the batch comes first."""
        *finer, deepest = self.unet.encoder(images)
        rebuilt = self.allspark(deepest, class_logits, crop_size=images.shape[2:], use_memory=use_memory)
        return self.unet.segmentation_head(self.unet.decoder([*finer, rebuilt]))


def main() -> None:
    """Train one step on noise, then predict."""
    torch.manual_seed(0)
    model = UnetWithAllSpark()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images, unlabeled = torch.rand(2, 2, 3, CROP, CROP)
    target = torch.randint(CLASSES, (2, CROP, CROP))

    with torch.no_grad():
        class_logits = model.eval()(unlabeled)  # the pseudo-label pass
    logits, unlabeled_logits = model.train()(torch.cat([images, unlabeled]), class_logits, use_memory=True).chunk(2)
    loss = (cross_entropy(logits, target) + cross_entropy(unlabeled_logits, class_logits.argmax(1))) / 2
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        labels = model.eval()(images).argmax(1)
    print(f"loss {loss.item():.3f}, labels {tuple(labels.shape)}")


if __name__ == "__main__":
    main()
