"""The method, a file a stage: data, seed, train, mix, finetune, baselines, evaluate, analyze, report."""
