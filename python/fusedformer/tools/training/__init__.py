"""The commands that train: pretraining, fine-tuning and few-shot prompting, on text that is here.

``text`` reads and tokenizes, ``tasks`` makes batches, models and baselines, ``stock`` has the same
models of torch's modules, ``trainer`` trains, saves and goes on, ``results`` writes what came out.
"""
