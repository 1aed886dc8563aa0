"""A mixed script: arithmetic, dictionaries, strings, objects, sorting, regular expressions."""
import json
import re


class Point:
    def __init__(self, x, y):
        self.x, self.y = x, y

    def norm(self):
        return self.x * self.x + self.y * self.y


def main():
    total = 0
    for i in range(1_000_000):
        total = (total * 31 + i) % 1000003
    words = {}
    for i in range(150_000):
        key = "w%d" % (i * 7919 % 5003)
        words[key] = words.get(key, 0) + 1
    points = [Point(i % 97, i % 89) for i in range(100_000)]
    points.sort(key=Point.norm)
    text = json.dumps(words, sort_keys=True)
    found = len(re.findall(r'"w(\d+)": (\d+)', text))
    print(total, len(words), points[5000].norm(), found, len(json.loads(text)))


main()
