"""Train, in the commands for pretraining, fine-tuning and few-shot prompting.

``text`` reads and tokenizes, ``tasks`` makes batches, models and baselines, ``stock`` has the same
models of torch's modules, ``trainer`` trains, saves and resumes, ``results`` writes the results.
"""
