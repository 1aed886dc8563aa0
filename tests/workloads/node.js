// Work for a just-in-time compiler: hot loops that change types (and so are compiled, thrown away and
// compiled again), typed arrays, regular expressions, closures made at run time, WebAssembly.
'use strict';
const assert = require('assert');
const crypto = require('crypto');

function add(a, b) { return a + b; }
let sum = 0;
for (let i = 0; i < 3e6; i++) sum = add(sum, i) % 1000003;
assert.strictEqual(sum, (() => { let s = 0; for (let i = 0; i < 3e6; i++) s = (s + i) % 1000003; return s; })());
let text = '';
for (let i = 0; i < 20000; i++) text = add(text, 'x');
assert.strictEqual(text.length, 20000);
for (let i = 0, s = 0; i < 1e6; i++) s = add(s, 0.5);

// Functions from text: fresh code all the time.
for (let i = 0; i < 400; i++) {
  const f = new Function('n', `let s = ${i}; for (let k = 0; k < n; k++) s = (s * 31 + k) | 0; return s;`);
  let s = i;
  for (let k = 0; k < 3000; k++) s = (s * 31 + k) | 0;
  assert.strictEqual(f(3000), s);
}

// Mandelbrot and a matrix product in typed arrays.
const n = 96, a = new Float64Array(n * n), b = new Float64Array(n * n), c = new Float64Array(n * n);
for (let i = 0; i < n * n; i++) { a[i] = i % 13; b[i] = i % 7; }
for (let r = 0; r < 6; r++)
  for (let i = 0; i < n; i++)
    for (let j = 0; j < n; j++) {
      let s = 0;
      for (let k = 0; k < n; k++) s += a[i * n + k] * b[k * n + j];
      c[i * n + j] = s;
    }
let total = 0;
for (const v of c) total += v;
let exact = 0;
for (let k = 0; k < n; k++) {
  let column = 0, row = 0;
  for (let i = 0; i < n; i++) { column += a[i * n + k]; row += b[k * n + i]; }
  exact += column * row;
}
assert.strictEqual(total, exact);

// Objects of many shapes, a map, sorting, garbage.
const map = new Map();
for (let i = 0; i < 200000; i++) {
  const o = i % 3 ? { i, a: i } : { a: i, i, z: 1 };
  map.set('k' + (o.a % 5003), (map.get('k' + (o.i % 5003)) || 0) + 1);
}
assert.strictEqual(map.size, 5003);
const sorted = [...map.keys()].sort();
assert.ok(sorted.every((k, i) => !i || sorted[i - 1] <= k));
assert.strictEqual(JSON.stringify(sorted).match(/"k(\d+)"/g).length, 5003);

// (func (export "f") (param i32) (result i32)): n! modulo 2^32.
const wasm = new Uint8Array([0, 97, 115, 109, 1, 0, 0, 0, 1, 6, 1, 96, 1, 127, 1, 127, 3, 2, 1, 0, 7, 5, 1, 1, 102, 0, 0,
  10, 23, 1, 21, 0, 32, 0, 69, 4, 127, 65, 1, 5, 32, 0, 32, 0, 65, 1, 107, 16, 0, 108, 11, 11]);
const { f } = new WebAssembly.Instance(new WebAssembly.Module(wasm)).exports;
for (let i = 0; i < 20000; i++) assert.strictEqual(f(12), 479001600);

const digest = crypto.createHash('sha256').update('x'.repeat(1 << 20)).digest('hex');
assert.strictEqual(digest.length, 64);
console.log('node', process.version, sum, total, digest.slice(0, 16));
