"""Evaluation: benchmarks, batched answers with masks, named protocols, and a report.

benchmarks       declarations (benchmarks.yaml): where the files are, how a row becomes a prompt, which protocol
cases            what is asked and what is right: prompt, pictures, reference answer, reference masks
readers          rows of `medsight.data`, and files that only ever measure, as cases
region_cases     what is asked of images with masks, by a benchmark's intent
predictions      predictions.jsonl: one answer a line, masks as COCO RLE
reference_codes  what a model's codebook calls the reference masks, and the group it takes an image for
runner           a checkpoint's answers to the cases, batched, resumable, over several processes
scoring          a score a row, by the metrics of medsight.metrics
summary          means with intervals, by data set, modality and target
scored_run       all of these, from a benchmark's rows to its report
figures          the figures of metrics.json in words
report           report.html, one self-contained page, with report_cases, the pictures
compare          paired differences of two evaluations over the same rows
codes            what each region code of a checkpoint stands for
diagseg          a benchmark made of diagnoses and the masks that show them
"""
