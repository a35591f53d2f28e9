"""Runs recognition networks in ONNX files with onnxruntime, and finds those of insightface."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdhooks.errors import KDHooksError, listed, near_miss
from kdhooks.onnx.files import RecognitionFile, read_recognition_file
from kdhooks.onnx.graphs import dims, image_inputs, naming, read_graph, require

_GIVES = {
    "tensor(double)": torch.float64,
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
}
_TAKES = {**_GIVES, "tensor(uint8)": torch.uint8}
_CUDA = "CUDAExecutionProvider"
_NUMPY = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.uint8: np.uint8,
}


class OnnxModel:
    """Runs an ONNX file with onnxruntime, for embeddings without gradients.

    It has no taps; `kdhooks.onnx.to_torch` returns a torch module, which has.
    """

    def __init__(
        self,
        source: str | Path | RecognitionFile,
        mean_std: tuple[float, float] | None = None,
    ) -> None:
        """
        source: a path, or a file that `read_recognition_file` has read.
        mean_std: overrides the scale that is derived from the file; for a path only.
        """
        if not isinstance(source, RecognitionFile):
            source = read_recognition_file(source, mean_std)
        file = source
        self.path = file.path
        self.size = file.size  # height, width
        self.mean = file.mean
        self.std = file.std
        self.sha256 = file.sha256
        self._file = file
        current = torch.cuda.current_device() if torch.cuda.is_available() else 0
        with naming(file.path):
            self._session = _open_session(file, current)
            self.provider: str = self._session.get_providers()[0]
            on_cuda = self.provider == _CUDA and torch.cuda.is_available()
            self._device = torch.device("cuda", current) if on_cuda else torch.device("cpu")
            takes, gives = self._session.get_inputs()[0].type, self._session.get_outputs()[0].type
            if takes not in _TAKES or gives not in _GIVES:
                raise KDHooksError(
                    f"{self.path.name} must take float or uint8 images and return float "
                    f"embeddings, got {takes} and {gives}; export it without quantised input and "
                    "output"
                )
            self._takes, self._gives = _TAKES[takes], _GIVES[gives]
            self.embedding_dim, self._trailing = self._tried()
            takes_batches = self._takes_batches()
        self.one_by_one = file.batch == 1 or not takes_batches

    def __call__(self, images: Tensor) -> Tensor:
        """(b 3 h w) -> (b e), float32, on the device of the images.

        Images must be as the file expects them: (pixels - mean) / std, in its order of channels.
        """
        if images.dim() != 4 or images.shape[1:] != (3, *self.size):
            raise KDHooksError(
                f"{self.path.name} takes images (b, 3, {self.size[0]}, {self.size[1]}), got "
                f"{tuple(images.shape)}; resize them first"
            )
        if not len(images):
            return torch.zeros(0, self.embedding_dim, device=images.device)
        embedding = self._embed(images.detach(), 1 if self.one_by_one else len(images))
        return embedding.float().to(images.device)

    def _embed(self, images: Tensor, at_once: int) -> Tensor:
        """(b 3 h w) -> (b e), on the device of onnxruntime."""
        images = arranged(images, self._file.channels_last, self._file.whole_pixels)
        images = images.to(self._device, self._takes).contiguous()
        embedding = images.new_empty(len(images), self.embedding_dim, dtype=self._gives)
        for some, into in zip(images.split(at_once), embedding.split(at_once), strict=True):
            self._run(some, into.view(*into.shape, *self._trailing))
        return embedding

    def _tried(self) -> tuple[int, list[int]]:
        """Run one image; return the width of its embedding, and the axes of length 1 after it."""
        image = arranged(torch.zeros(1, 3, *self.size), self._file.channels_last)
        feed = image.numpy().astype(_NUMPY[self._takes])
        try:
            embedding = np.asarray(self._session.run(None, {self._file.input: feed})[0])
        except Exception as error:  # the errors of onnxruntime have no class in common
            raise KDHooksError(
                f"onnxruntime must run {self.path.name} on an image {feed.shape}, but fails: "
                f"{error}; choose another file, or export it again"
            ) from error
        count, *axes = embedding.shape or (0,)
        if count != 1 or not axes or axes[1:] not in ([], [1, 1]):
            raise KDHooksError(
                f"a recognition model returns one embedding (b e), but {self.path.name} returns "
                f"{embedding.shape} for {feed.shape}; choose another file"
            )
        return axes[0], axes[1:]

    def _run(self, images: Tensor, into: Tensor) -> None:
        """(b 3 h w), (b e): read the images and write the embeddings, without copies."""
        binding = self._session.io_binding()
        binding.bind_input(self._file.input, *_buffer(images))
        binding.bind_output(self._file.output, *_buffer(into))
        if images.is_cuda:  # onnxruntime has its own stream, and waits for it before it returns
            torch.cuda.current_stream(images.device).synchronize()
        self._session.run_with_iobinding(binding)

    def _takes_batches(self) -> bool:
        """Whether a batch of two runs correctly.

        The declared shape does not tell: insightface opens the batch axis of graphs that were
        traced for one image.
        """
        images = torch.rand(2, 3, *self.size, generator=torch.Generator().manual_seed(0))
        single = self._embed(images, 1)
        if not torch.isfinite(single).all() or not single.any(dim=1).all():
            found = "zero" if torch.isfinite(single).all() else "not finite"
            raise KDHooksError(
                f"a recognition model returns embeddings that are finite and not zero, but those "
                f"of {self.path.name} are {found}; check its weights, or export it again"
            )
        try:
            both = self._embed(images, 2)
        except Exception:  # the errors of onnxruntime have no class in common
            return False
        return torch.allclose(both.float(), single.float(), rtol=1e-2, atol=1e-4)


def arranged(images: Tensor, channels_last: bool, whole_pixels: bool = False) -> Tensor:
    """(b 3 h w) -> (b 3 h w) or (b h w 3), rounded to 0..255 if pixels are whole."""
    if whole_pixels:
        images = images.round().clamp(0, 255)
    return images.permute(0, 2, 3, 1) if channels_last else images


def _buffer(x: Tensor) -> tuple[str, int, type, list[int], int]:
    """Return the arguments of an IOBinding: device, its number, dtype, shape and address."""
    return x.device.type, x.device.index or 0, _NUMPY[x.dtype], list(x.shape), x.data_ptr()


def _open_session(file: RecognitionFile, device_id: int) -> Any:
    """Open an onnxruntime.InferenceSession, on this CUDA device if onnxruntime supports it."""
    ort = require("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Between two runs the trainer needs the cores; by default the idle threads would spin.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not any(node.op_type == "QuantizeLinear" for node in file.model.graph.node):
        # At most the weights are quantised: convert them to float once, not in every run.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.log_severity_level = 4  # errors are raised anyway
    providers: list[str | tuple[str, dict[str, int]]] = ["CPUExecutionProvider"]
    if _CUDA in ort.get_available_providers():
        providers.insert(0, (_CUDA, {"device_id": device_id}))
    try:
        return ort.InferenceSession(file.model.SerializeToString(), options, providers=providers)
    except Exception as error:  # the errors of onnxruntime have no class in common
        raise KDHooksError(
            f"onnxruntime {ort.__version__} must load {file.path.name}, but fails: {error}; "
            f"a newer onnxruntime may know its operators, and if the file leaves its size open, it "
            f"may need another teacher.input.size than {list(file.size)}"
        ) from error


def insightface_model(
    name: str, root: str | Path = "~/.insightface", output: str | None = None
) -> Path:
    """Return the path of the recognition model in an installed insightface pack.

    It is recognised by its graph: it takes images of 112x112 and returns one embedding of at least
    128 numbers. No detector, landmark or age model of the packs does.
    output: name of the embedding, if the model has several outputs.
    """
    models = Path(root).expanduser() / "models"
    pack = models / name
    if not name:
        raise KDHooksError("an insightface pack must be named, as 'buffalo_l'; found ''")
    if not pack.is_dir():
        installed = [path.name for path in models.iterdir()] if models.is_dir() else []
        raise KDHooksError(
            f"an insightface pack must be installed, but {pack} does not exist; "
            f"{near_miss(name, installed)}installed: {listed(sorted(installed))}; "
            f"insightface.app.FaceAnalysis(name={name!r}) downloads it on first use"
        )
    # Some archives unpack to a nested folder; macOS adds ._x.onnx files, which are no models.
    files = sorted(file for file in pack.rglob("*.onnx") if not file.name.startswith("."))
    found = [file for file in files if _is_recognition(file, output)]
    if len(found) != 1:
        names = [str(file.relative_to(pack)) for file in found or files] or ["no ONNX file"]
        raise KDHooksError(
            f"an insightface pack must hold one recognition model, but {pack} holds "
            f"{len(found) or 'none'}: {listed(names)}; give the path of the file you want instead"
        )
    return found[0]


def _is_recognition(path: Path, output: str | None) -> bool:
    graph = read_graph(path).graph
    takes = [dims(value) for value in image_inputs(graph)]
    gives = [dims(value) for value in graph.output if output in (None, value.name)]
    return (
        len(takes) == 1
        and takes[0][1:] == (3, 112, 112)
        and len(gives) == 1
        and len(gives[0]) == 2
        and (gives[0][1] or 0) >= 128
    )
