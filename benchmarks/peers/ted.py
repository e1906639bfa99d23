"""TED: how the rank of the nearest clean image of the predicted class moves through the layers."""

from benchmarks.peers.base import Inspected, Labels, Matrix, Model
from benchmarks.peers.trajectories import Bank, PcaOutliers, choose_rows


class Ted:
    """Mo et al., IEEE S&P 2024, "Robust backdoor detection for deep learning via topological evolution dynamics".

    At layer l (`trajectories.is_layer`), ``K_l`` = how many clean bank rows are nearer (Euclidean, flattened activations)
    than the nearest of the predicted class; the vector of all layers, logits last, goes to a PCA outlier detector fitted on
    the bank's own vectors, each row ranked among the others. The bank is rightly classified images: the paper's 20 a class,
    more where there are more, up to 1,000 rows in all.
    """

    name, title, cheap = "ted", "TED", True

    def fit(self, model: Model, clean: Inspected, labels: Labels) -> None:
        """Read the bank's activations and follow its own rows."""
        self.bank = Bank(model, clean, choose_rows(clean.predicted, labels, model.classes))
        self.restrict(self.bank)
        self.outliers = PcaOutliers(self.bank.follow_itself())

    def restrict(self, bank: Bank) -> None:
        """Set the bank's radii; TED has none."""

    def score(self, model: Model, inspected: Inspected) -> Matrix:
        """One forward pass an image."""
        return self.outliers.score(self.bank.follow(model, inspected))
