"""The contract, on one screen: the hooks of a method. pluggy calls each of them once per run."""

from collections.abc import Sequence

import pluggy
from torch import nn

from kdhooks.declarations import ClassifierShare, EmbeddingTap, FeatureTap, Model, ParameterTap

hookspec = pluggy.HookspecMarker("kdhooks")
hookimpl = pluggy.HookimplMarker("kdhooks")


class Specs:
    """A hook receives the arguments that it names. It returns None if it declares nothing."""

    @hookspec
    def embedding_tap(self, student: Model, teacher: Model) -> EmbeddingTap | None:
        """Return a loss on the embeddings of both sides. Collected."""

    @hookspec
    def feature_tap(self, student: Model, teacher: Model) -> FeatureTap | None:
        """Return a loss on the outputs of named modules of both sides. Collected."""

    @hookspec
    def classifier_share(self, student: Model, teacher: Model) -> ClassifierShare | None:
        """Return a loss on class scores against the teacher's classifier. Collected."""

    @hookspec
    def parameter_tap(self, student: Model) -> ParameterTap | None:
        """Return a loss on the student's own weights. Collected."""

    @hookspec(firstresult=True)
    def adapt_teacher(self, teacher: Model) -> nn.Module | None:
        """Return a module called as (teacher module, images) -> embedding (b e), with grad. First.

        Its parameters (prompts, say) are trained; the teacher's own stay frozen.
        """

    @hookspec(firstresult=True)
    def model_stages(self, model: nn.Module) -> Sequence[str] | None:
        """Return the paths of a known backbone's stages, shallow to deep. First result."""

    @hookspec(firstresult=True)
    def student_view(self) -> nn.Module | None:
        """Return a module (b 3 h w) -> (b 3 h w) for the student's training images. First."""


HOOKS = tuple(name for name in vars(Specs) if not name.startswith("_"))
"""The names of the hooks, in the order above."""
