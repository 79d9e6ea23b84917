"""Everything that learns from caches. Never loads a teacher, and reports through callbacks only.

config: the recipe of a student. job: what a run is given and gives back. data: which samples a step sees. losses: what
they teach. learner: all that trains, in one module. loop: training, with watch and pictures beside it. metrics, scores,
predictors, latency, evaluate: how good and how fast a student is. runs, compare, report: the students side by side,
from MLflow.
"""
