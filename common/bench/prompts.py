"""What ``fourfold bench mtp`` asks: short requests of a chat, and texts to give back.

Each is one user message. The second kind stands for an agent that rewrites a file: most of the answer is in the prompt.
All were written for this benchmark; no head was trained on them.
"""

from __future__ import annotations

import re

_REQUESTS = """\
What should I look at when I buy a used bicycle?
Explain how a lock on a canal lifts a boat.
Write a polite note to a neighbour whose dog barks at night.
How is cheese made from milk?
Give me three ideas for a birthday party of a six year old who loves trains.
Why do some metals rust and others not?
Write a short poem about the first snow in a small town.
What is the difference between a violin and a viola?
How can I learn to type faster?
Describe a day in the life of a bee.
What does a project manager do all day?
Explain what inflation is to a teenager.
How do I keep basil alive on a window sill?
Write a product description for a wooden desk lamp.
What are tides, and why are there two of them a day?
How do noise cancelling headphones work?
Suggest a plan for a weekend in a city by the sea.
Why is bread dough left to rise twice?
What is the purpose of an index in a database?
Write a dialogue between a baker and an impatient customer.
How do I calm down before an exam?
Explain the rules of chess in a few paragraphs.
What makes a good cup of coffee?
How does a satellite stay in orbit?
Write a Python function that counts the vowels in a string.
What are the main parts of a letter of application?
Give five reasons to walk to work.
How does a hot air balloon change its direction?
Tell me a short story about a clock that ran backwards.
Why do cats purr?
What is a budget, and how do I make one for a month?
Explain how a zip fastener works.
What is the role of a referee in football?
Write an advertisement for a language course in the evening.
How do I remove a coffee stain from a cotton shirt?
Explain the difference between speed and acceleration with an example.
What are good questions to ask in a job interview?
How do trees survive a cold winter?
Write a short speech to thank a teacher who retires.
What is a compiler, in simple words?
How do I choose a pair of running shoes?
Describe the taste of a lemon to somebody who never had one.
Why do ships float although they are made of steel?
Give me a recipe for a vegetable soup.
What should a beginner know before a first camping trip?
Explain how a public library lends books.
Write a friendly reminder that the rent is due on Friday.
How does a thermos flask keep tea warm?
What are the advantages of learning an instrument as a child?
Explain to a child why we have to brush our teeth."""

_FILES = (
    '''\
class Account:
    """A bank account with a balance in cents."""

    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance
        self.history = []

    def deposit(self, amount):
        if amount <= 0:
            raise ValueError("the amount must be positive")
        self.balance += amount
        self.history.append(("deposit", amount))

    def withdraw(self, amount):
        if amount <= 0:
            raise ValueError("the amount must be positive")
        if amount > self.balance:
            raise ValueError("the balance is too low")
        self.balance -= amount
        self.history.append(("withdraw", amount))

    def report(self):
        for kind, amount in self.history:
            print(kind, amount)
        print("balance", self.balance)''',
    """\
import os
import sys

def find_files(folder, suffix):
    found = []
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if os.path.isdir(path):
            found.extend(find_files(path, suffix))
        elif name.endswith(suffix):
            found.append(path)
    return found

def count_lines(path):
    with open(path, encoding="utf-8") as file:
        return sum(1 for line in file if line.strip())

def main():
    folder = sys.argv[1] if len(sys.argv) > 1 else "."
    total = 0
    for path in find_files(folder, ".py"):
        lines = count_lines(path)
        print(path, lines)
        total += lines
    print("total", total)

if __name__ == "__main__":
    main()""",
    """\
const express = require('express');
const app = express();
const items = new Map();

app.use(express.json());

app.get('/items', (request, response) => {
  response.json([...items.values()]);
});

app.post('/items', (request, response) => {
  const { id, name, price } = request.body;
  if (!id || !name) {
    response.status(400).json({ error: 'id and name are required' });
    return;
  }
  items.set(id, { id, name, price });
  response.status(201).json(items.get(id));
});

app.delete('/items/:id', (request, response) => {
  items.delete(request.params.id);
  response.status(204).end();
});

app.listen(3000, () => console.log('listening on port 3000'));""",
    """\
server:
  host: 0.0.0.0
  port: 8080
  workers: 4
  timeout_seconds: 30
database:
  driver: postgres
  host: db.internal
  port: 5432
  name: orders
  user: service
  pool:
    min_size: 2
    max_size: 20
cache:
  driver: redis
  host: cache.internal
  port: 6379
  expire_seconds: 600
logging:
  level: info
  format: json
  file: /var/log/orders/service.log
  rotate_megabytes: 100
features:
  new_checkout: false
  send_receipts: true
  loyalty_points: false""",
    """\
The museum is open from Tuesday to Sunday between ten in the morning and six in the evening. On Thursdays it stays open
until nine. Tickets cost twelve euros for adults and six euros for students; children under ten do not pay. Groups of
more than fifteen people need to book a week in advance, by telephone or at the desk. The collection on the ground floor
shows the history of the harbour from the first wooden quay to the container terminal of today. The first floor has
maps, instruments and the models of forty ships, among them the steamer on which the founder sailed as a cook.
Photographs are allowed without a flash. Coats and large bags are left in the cloakroom, which is free. The cafe in the
garden serves soup, cake and coffee, and closes half an hour before the museum.""",
    """\
Minutes of the meeting of the garden society, held in the hall of the school on the fourth of March. Present were eleven
members; the treasurer sent her excuses. The chairman opened the meeting at seven and thanked the school for the room.
The minutes of the last meeting were read and accepted. The fence along the brook needs new posts before the summer. Two
members offered to fetch the wood, and the society pays for nails and paint. The water bill was higher than last year,
because a pipe near the compost had leaked for weeks. It was agreed to close the main tap every evening. The seed market
takes place on the last Saturday in April. Cakes are welcome. The next meeting is on the first of April at seven.""",
    """\
CREATE TABLE customers (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    email TEXT NOT NULL UNIQUE,
    city TEXT,
    created_at TIMESTAMP DEFAULT CURRENT_TIMESTAMP
);

CREATE TABLE orders (
    id INTEGER PRIMARY KEY,
    customer_id INTEGER NOT NULL REFERENCES customers (id),
    total NUMERIC NOT NULL,
    status TEXT NOT NULL DEFAULT 'open',
    created_at TIMESTAMP DEFAULT CURRENT_TIMESTAMP
);

CREATE INDEX orders_by_customer ON orders (customer_id);
CREATE INDEX orders_by_status ON orders (status);

SELECT customers.name, COUNT(orders.id) AS orders, SUM(orders.total) AS total
FROM customers
JOIN orders ON orders.customer_id = customers.id
WHERE orders.status = 'paid'
GROUP BY customers.name
ORDER BY total DESC;""",
    """\
#include <stdio.h>
#include <stdlib.h>

struct node {
    int value;
    struct node *next;
};

struct node *push(struct node *head, int value) {
    struct node *item = malloc(sizeof *item);
    if (item == NULL) {
        fprintf(stderr, "out of memory\\n");
        exit(1);
    }
    item->value = value;
    item->next = head;
    return item;
}

void print_list(const struct node *head) {
    while (head != NULL) {
        printf("%d\\n", head->value);
        head = head->next;
    }
}

int main(void) {
    struct node *head = NULL;
    for (int i = 0; i < 10; i++)
        head = push(head, i * i);
    print_list(head);
    return 0;
}""",
    """\
# Installation

The tool runs on Linux and macOS and needs Python 3.10 or later.

1. Clone the repository and enter its folder.
2. Create a virtual environment with `python -m venv .venv`.
3. Activate it with `source .venv/bin/activate`.
4. Install the requirements with `pip install -r requirements.txt`.
5. Copy `settings.example.toml` to `settings.toml` and set the address of your server.

# Usage

Run `python -m tool sync` to copy all new files to the server. Add `--dry-run` to see what would be copied. Files that
exist on the server are not replaced unless you add `--replace`. Run `python -m tool status` to see when each folder was
copied last.

# Problems

If the server does not answer, check the address in `settings.toml` and that port 8443 is open. The log is in
`~/.tool/log.txt`; please attach it when you report a problem.""",
    """\
Dear Mrs Harper,

thank you for your letter of the second of May. We are sorry that the bookshelf arrived with a broken board and without
the bag of screws. A new board and a complete set of screws left our warehouse this morning and should reach you before
the end of the week. You do not need to send the broken board back.

As a small apology we have added a voucher of fifteen pounds to your account. You can use it for any order until the end
of the year. If the new board is not right either, please call our service on weekdays between eight and five, and we
will send somebody to look at it.

We hope that you will enjoy the bookshelf for many years.

Yours sincerely,
Martin Cole
Customer Service""",
    """\
package main

import (
	"fmt"
	"os"
	"strings"
)

type Word struct {
	Text  string
	Count int
}

func countWords(text string) map[string]int {
	counts := make(map[string]int)
	for _, word := range strings.Fields(text) {
		word = strings.ToLower(strings.Trim(word, ".,;:!?"))
		if word != "" {
			counts[word]++
		}
	}
	return counts
}

func main() {
	data, err := os.ReadFile(os.Args[1])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	for word, count := range countWords(string(data)) {
		fmt.Println(word, count)
	}
}""",
    """\
To make the bread, mix five hundred grams of flour with ten grams of salt in a large bowl. Stir seven grams of dry yeast
into three hundred and twenty millilitres of warm water and wait until it foams. Pour the water into the flour and stir
with a wooden spoon until no dry flour is left. Turn the dough out on a board and knead it for ten minutes, until it is
smooth and springs back when you press it. Put it back into the bowl, cover it with a damp cloth and leave it in a warm
place for an hour. Press the air out, form a round loaf and place it on a tray. Let it rise for another half hour. Heat
the oven to two hundred and twenty degrees. Cut a cross into the loaf, dust it with flour and bake it for thirty five
minutes. It is done when it sounds hollow. Let it cool on a rack before you cut it.""",
)


def _misspell(text: str) -> str:
    """Exchange two letters in each of the first three long words."""
    return re.sub(r"[a-z]{7,}", lambda found: found[0][:2] + found[0][3] + found[0][2] + found[0][4:], text, count=3)


# What SmolLM2-135M answers by copying: three of four runs of four tokens in its greedy answers are in the prompt.
_TASKS = (
    "Please repeat the following exactly as it is:\n\n{}",
    "Proofread this text and write it again with all mistakes corrected:\n\n{}",
    "Fix the spelling mistakes in this text and give the whole text back:\n\n{}",
)

PROMPTS: dict[str, tuple[str, ...]] = {
    "chat": tuple(_REQUESTS.splitlines()),
    "edit": tuple(
        task.replace("{}", text if task is _TASKS[0] else _misspell(text)) for task in _TASKS for text in _FILES
    ),
}
