"""Run by test_parity.py in a process of its own, which does not have this package.

Usage: compute_parity.py FOLDER INPUTS OUTPUT. From a converted FOLDER, tensors in INPUTS (`pixel_values`,
`code_groups`) and prompts in INPUTS.json it computes what `expected.safetensors` of the parity files holds: with
AutoModelForImageTextToText into OUTPUT.0, with AutoModel into OUTPUT.1.
"""

import json
import runpy
import sys
from pathlib import Path


def compute(model, tokenizer, pixel_values, code_groups, meta):
    """The entries of `expected.safetensors`."""
    config = model.config
    regions = model.get_region_features(pixel_values)
    quantized = model.quantize_regions(regions.region_embeddings, code_groups)
    results = {
        "patch_features": regions.patch_features,
        "region_embeddings": regions.region_embeddings,
        "final_image_features": regions.image_features,
        "seg_logits": regions.masks_queries_logits,
        "class_logits": regions.class_queries_logits,
        "modality_logits": regions.group_logits,
        "code_indices": quantized.code_indices,
        "code_vectors": quantized.code_vectors,
        "reconstructed_regions": quantized.reconstructed_regions,
    }
    before = len(tokenizer(meta["image_block_after"]).input_ids)
    block = torch.full((config.image_seq_length,), config.image_token_id)
    for b, text in enumerate(meta["texts"]):
        text_ids = torch.tensor(tokenizer(text).input_ids)
        input_ids = torch.cat((text_ids[:before], block, text_ids[before:]))[None]
        images = pixel_values[b : b + 1]
        results[f"text_ids_{b}"] = text_ids
        results[f"logits_{b}"] = model(input_ids=input_ids, pixel_values=images).logits[0, before + len(block) :]
        results[f"mask_logits_{b}"] = model.decode_regions(input_ids, images).mask_logits[0]
    return {name: value.contiguous() for name, value in results.items()}


if __name__ == "__main__":
    hiding = runpy.run_path(str(Path(__file__).parents[2] / "hide_packages.py"))
    hiding["hide_packages"]()
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModel, AutoModelForImageTextToText, AutoTokenizer

    folder, inputs, output = sys.argv[1:]
    given = load_file(inputs)
    with open(f"{inputs}.json", encoding="utf-8") as file:
        meta = json.load(file)
    meta["texts"] = [text.replace("[M", "[C") for text in meta["texts"]]
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        for number, auto_class in enumerate((AutoModelForImageTextToText, AutoModel)):
            model = auto_class.from_pretrained(folder, trust_remote_code=True).eval()
            results = compute(model, tokenizer, given["pixel_values"], given["code_groups"], meta)
            save_file(results, f"{output}.{number}")
    hiding["assert_hidden"]()
