"""Tiny nets of every family that a defence meets, for `test_places.py` and `test_admission.py`."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

CLASSES = 5


class Net(nn.Module):
    """Modules by name, and a forward that says how they hang together."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.way = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.way(self, x)


@dataclass(frozen=True)
class Family:
    """A kind of net.

    Attributes:
        make: a net of it, with random weights.
        last: names of the layers that logits come from, no sites under "all".
        shape: of an image.
        heads: how many each attention has, in the order of calls.
        kinds: of all sites that are found.
        gates: modules with a gate once all sites are folded.
        published: how many sites are.
        unseen: convolutions, linear layers and tables that are no sites.
        needs: a package beside torch's.
    """

    make: Callable[[], nn.Module]
    last: tuple[str, ...] = ("fc",)
    shape: tuple[int, int, int] = (3, 16, 16)
    heads: tuple[int, ...] = ()
    kinds: str = "conv"
    gates: tuple[str, ...] = ()
    published: int = 0
    unseen: tuple[str, ...] = ()
    needs: str | None = None


def randomised(model):
    """Weights and statistics under which layers neither fade out nor are the identity."""
    for module in model.modules():
        own = module._parameters
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)) and own.get("weight") is not None:
            nn.init.kaiming_normal_(module.weight)
        if own.get("bias") is not None:
            nn.init.normal_(module.bias, std=0.3)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(std=0.5)
            module.running_var.uniform_(0.3, 1.5)
        norms = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
        if isinstance(module, norms) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.6, 1.6)
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            nn.init.normal_(module.in_proj_weight, std=0.5)
    return model.eval()


def built(family, seed=0, dtype=torch.float32):
    """A net of a family with random weights, the same for a seed, in eval mode."""
    if family.needs is not None:
        importlib.import_module(family.needs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = randomised(family.make())
    with torch.no_grad():
        for name in family.last:
            model.get_submodule(name).weight.mul_(4)
    return model.to(dtype)


def pictures(family, count=3, seed=1, dtype=torch.float32):
    """Different images in [0, 1] of a family's shape."""
    generator = torch.Generator().manual_seed(seed)
    channels, height, width = family.shape
    coarse = torch.rand(count, channels, height // 4, width // 4, generator=generator)
    fine = torch.rand(count, *family.shape, generator=generator)
    return (0.8 * F.interpolate(coarse, scale_factor=4) + 0.2 * fine).to(dtype)


# --- convolutional nets ---


def lenet_view():
    def forward(net, x):
        x = F.max_pool2d(F.relu(net.conv1(x)), 2)
        x = F.max_pool2d(F.relu(net.conv2(x)), 2)
        x = x.view(x.size(0), -1)
        return net.fc3(F.relu(net.fc2(F.relu(net.fc1(x)))))

    return Net(
        forward,
        conv1=nn.Conv2d(1, 4, 3),
        conv2=nn.Conv2d(4, 6, 3),
        fc1=nn.Linear(6 * 2 * 2, 13),
        fc2=nn.Linear(13, 11),
        fc3=nn.Linear(11, CLASSES),
    )


def lenet_average():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(4, 6, 3),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(6 * 2 * 3, 11),
        nn.Tanh(),
        nn.Linear(11, CLASSES),
    )


def two_convs(norm):
    def forward(net, x):
        x = F.relu(net.norm1(net.conv1(x)))
        x = F.relu(net.norm2(net.conv2(x)), inplace=True)
        return net.fc(x.mean((2, 3)))

    norms = {f"norm{n}": nn.BatchNorm2d(w) if norm else nn.Identity() for n, w in ((1, 4), (2, 6))}
    return Net(
        forward,
        conv1=nn.Conv2d(3, 4, 3, padding=1, bias=not norm),
        conv2=nn.Conv2d(4, 6, 3, stride=2),
        **norms,
        fc=nn.Linear(6, CLASSES),
    )


def all_convolutional(flat):
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 7, 3, stride=2),
        nn.ReLU(inplace=True),
        nn.Conv2d(7, CLASSES, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten() if flat else nn.Identity(),
    )


def group_norm():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.GroupNorm(3, 6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2),
        nn.GroupNorm(1, 8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )


def norm_free():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(6, 6, 3, padding=1)
            self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
            self.gain = nn.Parameter(torch.full((6, 1, 1), 0.7))

        def forward(self, x):
            return x + 0.5 * self.gain * self.conv2(F.gelu(self.conv1(F.gelu(x))))

    def forward(net, x):
        return net.fc(F.gelu(net.blocks(net.stem(x))).mean((2, 3)))

    blocks = nn.Sequential(Residual(), Residual())
    return Net(forward, stem=nn.Conv2d(3, 6, 3, stride=2), blocks=blocks, fc=nn.Linear(6, CLASSES))


def wide_resnet():
    """Pre-activation blocks; answers (maps, logits)."""

    class Block(nn.Module):
        def __init__(self, inside, outside, stride):
            super().__init__()
            self.bn1, self.bn2 = nn.BatchNorm2d(inside), nn.BatchNorm2d(outside)
            self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
            self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
            self.equal = inside == outside and stride == 1
            self.shortcut = None if self.equal else nn.Conv2d(inside, outside, 1, stride, bias=False)

        def forward(self, x):
            active = F.relu(self.bn1(x))
            out = self.conv2(F.dropout(F.relu(self.bn2(self.conv1(active))), training=self.training))
            return out + (x if self.shortcut is None else self.shortcut(active))

    def forward(net, x):
        maps = net.bn(net.block2(net.block1(net.conv1(x))))
        return maps, net.fc(F.avg_pool2d(F.relu(maps), 8).view(-1, 8))

    return Net(
        forward,
        conv1=nn.Conv2d(3, 4, 3, padding=1, bias=False),
        block1=Block(4, 4, 1),
        block2=Block(4, 8, 2),
        bn=nn.BatchNorm2d(8),
        fc=nn.Linear(8, CLASSES),
    )


def mobilenet():
    def layer(inside, outside, size=1, groups=1):
        conv = nn.Conv2d(inside, outside, size, padding=size // 2, groups=groups, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outside), nn.ReLU6(inplace=True))

    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2),
        layer(4, 8),
        layer(8, 8, 3, groups=8),
        nn.Conv2d(8, 6, 1, bias=False),
        nn.BatchNorm2d(6),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(6, CLASSES),
    )


def squeeze_excite():
    def forward(net, x):
        x = F.relu(net.bn(net.conv(x)))
        x = x * torch.sigmoid(net.expand(F.relu(net.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        gate = net.linear2(net.linear1(x.mean((2, 3))).relu()).sigmoid()
        return net.fc((x * gate[:, :, None, None]).amax((2, 3)))

    return Net(
        forward,
        conv=nn.Conv2d(3, 8, 3),
        bn=nn.BatchNorm2d(8),
        squeeze=nn.Conv2d(8, 3, 1),
        expand=nn.Conv2d(3, 8, 1),
        linear1=nn.Linear(8, 4),
        linear2=nn.Linear(4, 8),
        fc=nn.Linear(8, CLASSES),
    )


def dense():
    def forward(net, x):
        x = net.conv1(x)
        x = torch.cat([x, net.conv2(F.relu(net.bn1(x)))], 1)
        x = torch.cat([x, net.conv3(F.relu(net.bn2(x)))], 1)
        return net.fc(F.relu(x).mean((2, 3)))

    return Net(
        forward,
        conv1=nn.Conv2d(3, 4, 3),
        bn1=nn.BatchNorm2d(4),
        conv2=nn.Conv2d(4, 3, 3, padding=1),
        bn2=nn.BatchNorm2d(7),
        conv3=nn.Conv2d(7, 3, 3, padding=1),
        fc=nn.Linear(10, CLASSES),
    )


def one_dimensional():
    def forward(net, x):
        x = F.relu(net.conv(x)).flatten(2)
        return net.fc(F.relu(net.along(x)).mean(2))

    return Net(forward, conv=nn.Conv2d(3, 6, 4, 4), along=nn.Conv1d(6, 7, 3), fc=nn.Linear(7, CLASSES))


# --- convolutions whose weights are not simply their own ---


def around(layer, **others):
    """A net with this layer of 6 channels between two plain ones."""

    def forward(net, x):
        return net.fc(F.relu(net.after(F.relu(net.layer(F.relu(net.before(x)))))).mean((2, 3)))

    return Net(
        forward,
        before=nn.Conv2d(3, 6, 3),
        layer=layer,
        after=nn.Conv2d(6, 7, 3),
        fc=nn.Linear(7, CLASSES),
    )


class Standardised(nn.Conv2d):
    """A convolution with weights of mean 0 and variance 1."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return self._conv_forward(x, weight, self.bias)


class Shifted(nn.Conv2d):
    """A convolution that adds something behind its weights."""

    def forward(self, x):
        return super().forward(x) + 0.25


def old_weight_norm():
    with torch.no_grad():
        return nn.utils.weight_norm(nn.Conv2d(6, 6, 3))


def tied_modules():
    def forward(net, x):
        x = F.relu(net.a(F.relu(net.stem(x))))
        return net.fc(F.relu(net.b(x)).mean((2, 3)))

    twice = nn.Conv2d(6, 6, 3)
    return Net(forward, stem=nn.Conv2d(3, 6, 3), a=twice, b=twice, fc=nn.Linear(6, CLASSES))


def tied_weights():
    def forward(net, x):
        x = F.relu(net.a(F.relu(net.stem(x))))
        return net.fc(F.relu(net.b(x)).mean((2, 3)))

    net = Net(
        forward,
        stem=nn.Conv2d(3, 6, 3),
        a=nn.Conv2d(6, 6, 3),
        b=nn.Conv2d(6, 6, 3),
        fc=nn.Linear(6, CLASSES),
    )
    net.b.weight = net.a.weight
    return net


def never_called():
    def forward(net, x):
        x = F.relu(F.conv2d(net.stem(x), net.conv.weight, net.conv.bias))
        return net.fc(x.mean((2, 3)))

    return Net(forward, stem=nn.Conv2d(3, 4, 3), conv=nn.Conv2d(4, 6, 3), fc=nn.Linear(6, CLASSES))


def read_besides():
    def forward(net, x):
        x = F.relu(net.conv(x)) * net.conv.weight.square().mean()
        return net.fc(F.relu(net.after(x)).mean((2, 3)))

    return Net(forward, conv=nn.Conv2d(3, 6, 3), after=nn.Conv2d(6, 7, 3), fc=nn.Linear(7, CLASSES))


def two_names():
    def forward(net, x):
        return net.fc(net.features(x).mean((2, 3)))

    conv1, conv2 = nn.Conv2d(3, 6, 3), Shifted(6, 7, 3)
    features = nn.Sequential(conv1, nn.BatchNorm2d(6), nn.ReLU(), conv2, nn.ReLU())
    return Net(forward, conv1=conv1, conv2=conv2, features=features, fc=nn.Linear(7, CLASSES))


# --- nets of linear layers ---


def perceptron(norm):
    def layer(inside, outside):
        return [
            nn.Linear(inside, outside),
            nn.BatchNorm1d(outside) if norm else nn.Identity(),
            nn.ReLU(),
        ]

    return nn.Sequential(
        nn.Flatten(), *layer(48, 11), *layer(11, 9), nn.Dropout(0.3), nn.Linear(9, CLASSES)
    )


def cosine_head():
    def forward(net, x):
        x = F.relu(net.fc1(F.relu(net.conv(x)).flatten(1)))
        return 8 * F.linear(F.normalize(x), F.normalize(net.fc2.weight))

    return Net(
        forward,
        conv=nn.Conv2d(3, 4, 4, 4),
        fc1=nn.Linear(64, 12),
        fc2=nn.Linear(12, CLASSES, bias=False),
    )


def mixer():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
            self.tokens = nn.Sequential(nn.Linear(16, 11), nn.GELU(), nn.Linear(11, 16))
            self.channels = nn.Sequential(nn.Linear(8, 13), nn.GELU(), nn.Linear(13, 8))

        def forward(self, x):
            x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
            return x + self.channels(self.norm2(x))

    def forward(net, x):
        x = net.stem(x).flatten(2).transpose(1, 2)
        return net.fc(net.norm(net.blocks(x)).mean(1))

    return Net(
        forward,
        stem=nn.Conv2d(3, 8, 4, 4),
        blocks=nn.Sequential(Block(), Block()),
        norm=nn.LayerNorm(8),
        fc=nn.Linear(8, CLASSES),
    )


def convnext():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
            self.norm = nn.LayerNorm(6)
            self.wide, self.narrow = nn.Linear(6, 13), nn.Linear(13, 6)
            self.scale = nn.Parameter(torch.full((6,), 0.5))

        def forward(self, x):
            out = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
            out = self.scale * self.narrow(F.gelu(self.wide(out)))
            return x + out.permute(0, 3, 1, 2)

    def forward(net, x):
        return net.fc(net.norm(net.blocks(net.stem(x)).mean((2, 3))))

    return Net(
        forward,
        stem=nn.Conv2d(3, 6, 2, 2),
        blocks=nn.Sequential(Block(), Block()),
        norm=nn.LayerNorm(6),
        fc=nn.Linear(6, CLASSES),
    )


# --- attention ---


def vit_torchvision():
    from torchvision.models import VisionTransformer

    return VisionTransformer(16, 8, 2, 3, 12, 22, num_classes=CLASSES)


def torchs_encoder(batch_first, norm_first=False):
    def forward(net, x):
        tokens = net.stem(x).flatten(2)
        tokens = tokens.permute(0, 2, 1) if batch_first else tokens.permute(2, 0, 1)
        return net.fc(net.encoder(tokens).mean(1 if batch_first else 0))

    layer = nn.TransformerEncoderLayer(
        12, 3, 22, dropout=0.1, batch_first=batch_first, norm_first=norm_first
    )
    return Net(
        forward,
        stem=nn.Conv2d(3, 12, 8, 8),
        encoder=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        fc=nn.Linear(12, CLASSES),
    )


class Joined(nn.Module):
    """Self-attention as in timm."""

    def __init__(self):
        super().__init__()
        self.num_heads = 3
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))


class Apart(nn.Module):
    """Self-attention as in transformers, with a table of positions."""

    def __init__(self):
        super().__init__()
        self.num_attention_heads = 2
        self.query, self.key, self.value = (nn.Linear(12, 12) for _ in range(3))
        self.output = nn.Linear(12, 12, bias=False)
        self.positions = nn.Embedding(4, 12)

    def forward(self, x):
        x = x + self.positions(torch.arange(x.shape[1], device=x.device))
        q, k, v = (
            layer(x).unflatten(2, (self.num_attention_heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        return self.output((weights @ v).transpose(1, 2).reshape(x.shape))


def own_vit(attention):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(12), nn.LayerNorm(12)
            self.attention = attention()
            self.mlp = nn.Sequential(nn.Linear(12, 22), nn.GELU(), nn.Linear(22, 12))

        def forward(self, x):
            x = x + self.attention(self.norm1(x))
            return x + self.mlp(self.norm2(x))

    def forward(net, x):
        x = net.blocks(net.stem(x).flatten(2).transpose(1, 2))
        return net.fc(net.norm(x)[:, 0])

    return Net(
        forward,
        stem=nn.Conv2d(3, 12, 8, 8),
        blocks=nn.Sequential(Block(), Block()),
        norm=nn.LayerNorm(12),
        fc=nn.Linear(12, CLASSES),
    )


def attention_pool():
    """A learned query that reads the tokens."""

    def forward(net, x):
        tokens = F.relu(net.stem(x)).flatten(2).transpose(1, 2)
        read, _ = net.attention(net.query.expand(len(x), -1, -1), tokens, tokens)
        return net.fc(read[:, 0])

    net = Net(
        forward,
        stem=nn.Conv2d(3, 12, 8, 8),
        attention=nn.MultiheadAttention(12, 4, batch_first=True),
        fc=nn.Linear(12, CLASSES),
    )
    net.query = nn.Parameter(torch.randn(1, 1, 12))
    return net


def other_keys():
    """An attention that torch computes from three weights, and that is left to it."""

    def forward(net, x):
        tokens = F.relu(net.stem(x)).flatten(2).transpose(1, 2)
        read, _ = net.attention(net.wide(tokens), tokens, tokens, need_weights=False)
        return net.fc(read.mean(1))

    return Net(
        forward,
        stem=nn.Conv2d(3, 6, 8, 8),
        wide=nn.Linear(6, 12),
        attention=nn.MultiheadAttention(12, 2, kdim=6, vdim=6, batch_first=True),
        fc=nn.Linear(12, CLASSES),
    )


def causal():
    """Tokens that see only those before them."""

    def forward(net, x):
        tokens = net.stem(x).flatten(2).transpose(1, 2)
        later = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
        return net.fc(net.encoder(tokens, src_mask=later)[:, -1])

    return Net(
        forward,
        stem=nn.Conv2d(3, 12, 8, 8),
        encoder=nn.TransformerEncoderLayer(12, 3, 22, batch_first=True),
        fc=nn.Linear(12, CLASSES),
    )


def swin_torchvision():
    from torchvision.models import SwinTransformer

    return SwinTransformer([2, 2], 8, [2, 1], [2, 4], [4, 4], num_classes=CLASSES)


def words():
    """Colours looked up in a table, beside a convolution."""

    def forward(net, x):
        codes = (x.mean(1) * 7.999).long()
        looked_up = net.table(codes).permute(0, 3, 1, 2)
        return net.fc(F.relu(net.conv(x) + net.mix(looked_up)).mean((2, 3)))

    return Net(
        forward,
        table=nn.Embedding(8, 6),
        conv=nn.Conv2d(3, 7, 3, padding=1),
        mix=nn.Conv2d(6, 7, 3, padding=1),
        fc=nn.Linear(7, CLASSES),
    )


def two_heads():
    """Two classifiers whose answers are averaged."""

    def forward(net, x):
        x = F.relu(net.conv(x)).mean((2, 3))
        x = F.relu(net.hidden(x))
        return (net.fc_a(x) + net.fc_b(x)) / 2

    return Net(
        forward,
        conv=nn.Conv2d(3, 6, 3),
        hidden=nn.Linear(6, 9),
        fc_a=nn.Linear(9, CLASSES),
        fc_b=nn.Linear(9, CLASSES),
    )


def recurrent():
    def forward(net, x):
        rows, _ = net.rnn(x.permute(0, 2, 1, 3).flatten(2))
        return net.fc(F.relu(net.hidden(rows.mean(1))))

    return Net(
        forward,
        rnn=nn.GRU(48, 7, batch_first=True),
        hidden=nn.Linear(7, 9),
        fc=nn.Linear(9, CLASSES),
    )


def timms(module, name, **settings):
    def make():
        import timm.models

        return getattr(getattr(timm.models, module), name)(num_classes=CLASSES, **settings)

    return make


def hugging_face():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=22,
        image_size=16,
        patch_size=8,
        num_labels=CLASSES,
    )
    return ViTForImageClassification(config)


FAMILIES = {
    "lenet, view": Family(lenet_view, ("fc3",), (1, 16, 16), kinds="conv features linear", published=2),
    "lenet, average": Family(
        lenet_average, ("9",), (1, 12, 16), kinds="conv features linear", published=2
    ),
    "two convs": Family(lambda: two_convs(False), published=2),
    "two convs, batch norm": Family(lambda: two_convs(True), published=2, kinds="conv norm"),
    "all convolutional": Family(
        lambda: nn.Sequential(
            *all_convolutional(True)[:4], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, CLASSES)
        ),
        ("6",),
        published=2,
    ),
    "ends in 1x1": Family(lambda: all_convolutional(True), ("4",), published=3),
    "ends in 1x1, not flat": Family(lambda: all_convolutional(False), ("4",), published=3),
    "group norm": Family(group_norm, ("8",), published=2, kinds="conv norm"),
    "norm free": Family(norm_free, published=5),
    "wide resnet": Family(wide_resnet, published=6, kinds="conv norm"),
    "mobilenet": Family(mobilenet, ("8",), published=4, kinds="conv norm"),
    "squeeze excite": Family(squeeze_excite, kinds="conv linear norm", published=3),
    "dense": Family(dense, kinds="conv features norm", published=3),
    "one dimensional": Family(one_dimensional, published=1),
    "weight norm, old": Family(lambda: around(old_weight_norm()), gates=("layer",), published=3),
    "weight norm": Family(
        lambda: around(nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 6, 3))),
        gates=("layer",),
        published=3,
    ),
    "spectral norm": Family(
        lambda: around(nn.utils.parametrizations.spectral_norm(nn.Conv2d(6, 6, 3))),
        gates=("layer",),
        published=3,
    ),
    "pruned": Family(
        lambda: around(prune.l1_unstructured(nn.Conv2d(6, 6, 3), "weight", 0.5)),
        gates=("layer",),
        published=3,
    ),
    "standardised": Family(lambda: around(Standardised(6, 6, 3)), gates=("layer",), published=3),
    "own forward": Family(lambda: around(Shifted(6, 6, 3)), gates=("layer",), published=3),
    "tied modules": Family(tied_modules, gates=(), published=2),
    "tied weights": Family(tied_weights, gates=("a", "b"), published=3),
    "never called": Family(never_called, kinds="conv features", published=1, unseen=("conv",)),
    "read besides": Family(read_besides, gates=("conv",), published=2),
    "two names": Family(two_names, gates=("conv2", "features.3"), published=2, kinds="conv norm"),
    "linear layers": Family(lambda: perceptron(False), ("8",), (3, 4, 4), kinds="features linear"),
    "linear layers, batch norm": Family(
        lambda: perceptron(True), ("8",), (3, 4, 4), kinds="features linear norm"
    ),
    "cosine head": Family(cosine_head, ("fc2",), kinds="conv features linear", published=1),
    "mixer": Family(mixer, kinds="conv linear norm", published=1),
    "convnext": Family(convnext, kinds="conv linear norm", published=3),
    "vit, torchvision": Family(
        vit_torchvision,
        ("heads.head",),
        heads=(3, 3),
        kinds="block conv heads linear norm",
        published=2,
    ),
    "torch's encoder": Family(
        lambda: torchs_encoder(True),
        heads=(3, 3),
        kinds="block conv heads linear norm",
        published=2,
    ),
    "torch's encoder, norm first": Family(
        lambda: torchs_encoder(True, norm_first=True),
        heads=(3, 3),
        kinds="block conv heads linear norm",
        published=2,
    ),
    "torch's encoder, tokens first": Family(
        lambda: torchs_encoder(False),
        heads=(3, 3),
        kinds="block conv heads linear norm",
        published=2,
    ),
    "causal encoder": Family(
        causal, kinds="block conv linear norm", published=1, unseen=("encoder.self_attn.out_proj",)
    ),
    "vit, joined": Family(
        lambda: own_vit(Joined),
        heads=(3, 3),
        kinds="conv heads linear norm projection",
        published=1,
    ),
    "vit, apart": Family(
        lambda: own_vit(Apart),
        heads=(2, 2),
        kinds="conv heads linear norm projection",
        published=1,
        unseen=("blocks.0.attention.positions", "blocks.1.attention.positions"),
    ),
    "attention pool": Family(attention_pool, heads=(4,), kinds="conv heads linear", published=1),
    "other keys": Family(other_keys, kinds="conv linear", published=1, unseen=("attention.out_proj",)),
    "swin, torchvision": Family(
        swin_torchvision,
        ("head",),
        kinds="conv linear norm",
        published=1,
        unseen=tuple(
            f"features.{place}.attn.{layer}"
            for place in ("1.0", "1.1", "3.0")
            for layer in ("qkv", "proj")
        ),
    ),
    "words": Family(words, kinds="conv embedding", published=2),
    "two heads": Family(two_heads, ("fc_a", "fc_b"), kinds="conv linear", published=1),
    "recurrent": Family(recurrent, kinds="features linear"),
    "vit, timm": Family(
        timms(
            "vision_transformer",
            "VisionTransformer",
            **{
                "img_size": 16,
                "patch_size": 8,
                "embed_dim": 12,
                "depth": 2,
                "num_heads": 3,
                "mlp_ratio": 2,
            },
        ),
        ("head",),
        heads=(3, 3),
        kinds="block conv heads linear projection",
        published=2,
        needs="timm",
    ),
    "swin, timm": Family(
        timms(
            "swin_transformer",
            "SwinTransformer",
            **{"img_size": 16, "patch_size": 2, "embed_dim": 8, "depths": (2, 1), "num_heads": (2, 4)},
            window_size=4,
        ),
        ("head.fc",),
        heads=(2, 2, 4),
        kinds="conv heads linear norm projection",
        published=1,
        needs="timm",
    ),
    "convnext, timm": Family(
        timms("convnext", "ConvNeXt", depths=(1, 1, 1, 1), dims=(4, 6, 7, 8)),
        ("head.fc",),
        (3, 32, 32),
        kinds="conv linear",
        published=8,
        needs="timm",
    ),
    "vit, transformers": Family(
        hugging_face,
        ("classifier",),
        heads=(3, 3),
        kinds="conv heads linear norm projection",
        published=1,
        needs="transformers",
    ),
}
