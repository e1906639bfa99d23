"""A tiny network with batch norm, clean images and others to inspect, for the tests of the peers."""

import numpy as np
import torch
from torch import nn

from benchmarks.peers import Inspected, Model, make_peer
from benchmarks.peers.base import split
from shapes import KINDS, draw_shapes

TAPS, WIDTH = 3, 8
LATENT_PEERS = ("knn", "mahalanobis", "rmd", "probe", "meandist", "ratio", "lda", "ranks", "latent_all", "latent_all_doubt")


class Tiny(nn.Module):
    """Two stages of two convolutions with batch norm; the head is fitted in closed form."""

    def __init__(self, norm=True):
        super().__init__()
        shapes = ((3, 12, 2), (12, 12, 1), (12, 16, 2), (16, 16, 1))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, s, 1), nn.BatchNorm2d(b) if norm else nn.Identity(), nn.ReLU())
            for a, b, s in shapes
        )
        self.head = nn.Linear(16, KINDS)

    def activations(self, x):
        ends = []
        for block in self.blocks:
            x = block(x)
            ends.append(x)
        ends.append(x.mean((2, 3)))
        return ends, self.head(ends[-1])

    def forward(self, x):
        return self.activations(x)[1]


class Fixed(nn.Module):
    """Logits straight from a function of the pixels."""

    def __init__(self, function):
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.function(x)


def pool(model, images):
    ends, logits = model.activations(images)
    rows = [end.mean((2, 3)) if end.ndim == 4 else end for end in ends]
    latents = np.zeros((len(images), TAPS, WIDTH), np.float32)
    for tap, (row, kept) in enumerate(zip((rows[0], rows[2], rows[4]), (6, WIDTH, WIDTH), strict=True)):
        latents[:, tap, :kept] = row[:, :kept]
    return latents, logits


def make_world():
    """Model, clean images with labels, other images to inspect."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Tiny()
    images, kinds = draw_shapes(480, seed=1)
    images //= 3  # dark enough that SCALE-UP does not saturate them all
    model = Model(network, KINDS)
    network.train()
    with torch.no_grad():
        for _ in range(30):
            network(model.load(images[:160]))
    network.eval()
    features = np.concatenate([model.activations(images[part])[0][-1] for part in split(480)]).astype(np.float64)
    centre = features.mean(axis=0)
    design = features - centre
    weight = np.linalg.solve(design.T @ design + 1e-4 * np.eye(16), design.T @ (np.eye(KINDS)[kinds] - 0.25)).T * 8
    with torch.no_grad():
        network.head.weight.copy_(torch.from_numpy(weight).float())
        network.head.bias.copy_(torch.from_numpy(-weight @ centre).float())
    latents, logits = pool(model, images)
    scale = latents[:240].std(axis=0)
    latents = ((latents - latents[:240].mean(axis=0)) / np.where(scale > 0, scale, 1)).astype(np.float32)
    everything = Inspected(images, logits, latents)
    assert (everything.predicted == kinds).mean() > 0.6
    assert np.unique(everything.predicted[:240]).size == KINDS
    model.forwards = 0.0
    return model, take(everything, np.arange(240)), kinds[:240], take(everything, np.arange(240, 264))


def take(inspected, rows):
    return Inspected(inspected.images[rows], inspected.logits[rows], inspected.latents[rows])


def fit(name, world):
    model, clean, labels, _ = world
    peer = make_peer(name)
    peer.fit(model, clean, labels)
    return peer
