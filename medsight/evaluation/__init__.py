"""Evaluation: benchmarks, batched answers with masks, named protocols, and a report.

benchmarks   declarations (benchmarks.yaml): where the files are, how a row becomes a prompt, which protocol
items        rows of a data set as items: prompt, pictures, reference answer, reference masks
readers      how the files of each layout become items
predictions  predictions.jsonl: one answer a line, masks as COCO RLE
reference_codes  what a model's codebook calls the reference masks, and the group it takes an image for
runner       a checkpoint's answers to the items, batched, resumable, over several processes
scoring      a score a row, by the metrics of medsight.metrics
summary      means with intervals, by data set, modality and target
figures      the figures of metrics.json in words
report       report.html, one self-contained page, with report_cases and report_codes
compare      paired differences of two evaluations over the same rows
codes        what each region code of a checkpoint stands for
diagseg      diagnoses of images with masks, and items made from them
"""
