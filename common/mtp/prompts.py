"""Short prompts that `probe` sends: beginnings of code, and of conversations as plain text.

Plain text, so that models without a chat template answer too. Kept for comparison over time: to change one changes
what a probe measures.
"""

from __future__ import annotations

_CODE = (
    'def binary_search(items: list[int], wanted: int) -> int:\n    """Return the index of wanted, or -1."""\n',
    "class LinkedList:\n    def __init__(self):\n        self.head = None\n\n    def append(self, value):\n",
    "import csv\n\ndef read_rows(path):\n    with open(path, newline='') as file:\n",
    "def quicksort(items):\n    if len(items) <= 1:\n        return items\n",
    "def is_prime(n):\n    if n < 2:\n        return False\n",
    "from dataclasses import dataclass\n\n@dataclass\nclass Point:\n    x: float\n    y: float\n\n    def norm(",
    "def word_count(text):\n    counts = {}\n    for word in text.split():\n",
    "import json\n\ndef load_config(path):\n    try:\n        with open(path) as file:\n",
    "def transpose(matrix):\n    rows = len(matrix)\n    columns = len(matrix[0])\n",
    "def gcd(a, b):\n    while b:\n",
    "class Stack:\n    def __init__(self):\n        self._items = []\n\n    def push(self, item):\n",
    "import unittest\n\nclass TestAddition(unittest.TestCase):\n    def test_positive(self):\n",
    "#include <stdio.h>\n\nint main(void) {\n    for (int i = 0; i < 10; i++) {\n",
    "#include <vector>\n#include <algorithm>\n\nint largest(const std::vector<int>& values) {\n",
    "int strlen_(const char *s) {\n    int n = 0;\n",
    "void swap(int *a, int *b) {\n    int t = *a;\n",
    "function debounce(fn, delay) {\n  let timer = null;\n  return function (...args) {\n",
    "const express = require('express');\nconst app = express();\n\napp.get('/', (req, res) => {\n",
    "async function fetchUser(id) {\n  const response = await fetch(`/api/users/${id}`);\n",
    "export interface User {\n  id: number;\n  name: string;\n",
    "SELECT customers.name, COUNT(orders.id) AS orders\nFROM customers\n",
    "CREATE TABLE employees (\n    id INTEGER PRIMARY KEY,\n    name TEXT NOT NULL,\n",
    "#!/bin/bash\nset -e\n\nfor file in *.txt; do\n",
    "FROM python:3.12-slim\nWORKDIR /app\nCOPY requirements.txt .\n",
    'package main\n\nimport "fmt"\n\nfunc fibonacci(n int) int {\n',
    "fn factorial(n: u64) -> u64 {\n    match n {\n",
    "public class Counter {\n    private int count = 0;\n\n    public void increment() {\n",
    "<!DOCTYPE html>\n<html>\n<head>\n    <title>Contact</title>\n",
    "body {\n    margin: 0;\n    font-family: sans-serif;\n}\n\n.header {\n",
    "services:\n  web:\n    image: nginx:latest\n    ports:\n",
    '{\n  "name": "example",\n  "version": "1.0.0",\n  "scripts": {\n',
    "import torch\nfrom torch import nn\n\nclass Mlp(nn.Module):\n    def __init__(self, width):\n",
)
_QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Explain what a hash table is in a few sentences.",
    "Why is the sky blue?",
    "Write a short polite email that declines a meeting.",
    "List the planets of the solar system in order.",
    "What is the difference between a process and a thread?",
    "Give me a simple recipe for pancakes.",
    "Summarise the story of Romeo and Juliet in three sentences.",
    "How do vaccines work?",
    "Translate 'good morning, how are you?' into Spanish, French and German.",
    "What are the primary colours, and how do they mix?",
    "Explain recursion to a beginner, with an example.",
    "How many days are there in each month?",
    "What is photosynthesis?",
    "Write a haiku about autumn.",
    "What are the advantages of unit tests?",
    "Describe how a bill becomes a law in the United States.",
    "What is 17 times 23? Show each step.",
    "Give five tips for better sleep.",
    "What is the difference between TCP and UDP?",
    "Who wrote 'Pride and Prejudice', and what is it about?",
    "Explain the water cycle.",
    "How do I undo the last commit in git?",
    "Write the first paragraph of a story about a lighthouse keeper.",
    "What causes the seasons?",
    "Name ten common fruits.",
    "What does HTTP status 404 mean?",
    "How does compound interest work? Give an example.",
    "What should I pack for a weekend in the mountains?",
    "Explain the difference between weather and climate.",
    "How does a refrigerator keep food cold?",
    "What is machine learning?",
)
_CHAT = tuple(f"User: {question}\n\nAssistant:" for question in _QUESTIONS)

# Alternating, so that any number of them from the start on is half code and half conversation.
PROMPTS: tuple[str, ...] = tuple(prompt for pair in zip(_CODE, _CHAT, strict=True) for prompt in pair)
