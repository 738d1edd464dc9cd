"""Read other projects' recipes into ours, and say what of them rotted.

`srt` reads srt-slurm and InferenceX, `vllm_recipes` reads vllm-project/recipes; both give deployments. `building` makes
a recipe of one, with today's names. What has no place in a recipe is listed, never dropped without a word. Nothing of
a file is run.
"""
