// Serve an exported model from Node.js: ONNX Runtime runs dense.onnx, rows come from a Redis Cluster. No Python, no PyTorch.
//
//   npm install --ignore-scripts onnxruntime-node ioredis
//   python -m tablewright publish out/dlrm redis-cluster://127.0.0.1:7000,127.0.0.1:7001
//   node serve.mjs out/dlrm 127.0.0.1:7000,127.0.0.1:7001 request.json
//
// request.json: {"dense": {"shape": [2, 13], "data": [...]}, "ids": {"shape": [2, 26], "data": [...]}}. Prints the outputs as JSON.
// What it speaks is written down in docs/row_protocol.md. Models whose ids are computed in the graph (pre.onnx), bags of more than one id, and
// delta versions are left out to keep it short.

import { readFileSync } from "node:fs";
import { join } from "node:path";
import Redis from "ioredis";
import * as ort from "onnxruntime-node";

const PARTITIONS = 24n;
const U64 = (1n << 64n) - 1n;

function partitionOf(table, id) {
  let z = ((BigInt(table) << 48n) | id) & U64;
  z = ((z ^ (z >> 30n)) * 0xbf58476d1ce4e5b9n) & U64;
  z = ((z ^ (z >> 27n)) * 0x94d049bb133111ebn) & U64;
  return Number((z ^ (z >> 31n)) % PARTITIONS);
}

function field(table, id) {
  const raw = Buffer.alloc(10);
  raw.writeUInt16LE(table, 0);
  raw.writeBigInt64LE(id, 2);
  return raw;
}

function decode(raw, { dim, row_dtype }, out, at) {
  const view = new DataView(raw.buffer, raw.byteOffset, raw.length);
  if (row_dtype === "float32") for (let i = 0; i < dim; i++) out[at + i] = view.getFloat32(4 * i, true);
  else if (row_dtype === "int8_rowwise") {
    const scale = view.getFloat32(dim, true), offset = view.getFloat32(dim + 4, true);
    for (let i = 0; i < dim; i++) out[at + i] = Math.fround(Math.fround(raw[i] * scale) + offset);
  } else throw new Error(`rows of type ${row_dtype} are not read by this example`);
}

// The ids that a lookup takes, one for each row of the batch.
function idsOf(lookup, request) {
  const { ids } = lookup, column = ids.column ?? ids.columns?.[0];
  const single = ids.columns === undefined || ids.columns[1] - ids.columns[0] === 1;
  if (ids.input === undefined || !single || lookup.offsets || lookup.weights || (lookup.padding_idx ?? null) !== null)
    throw new Error(`the lookup of table ${lookup.table} needs more than this example does`);
  const { shape, data } = request[ids.input], width = shape[1] ?? 1;
  return Array.from({ length: shape[0] }, (_, row) => BigInt(data[row * width + (column ?? 0)]));
}

async function main([home, address, requestFile]) {
  const root = join(home, readFileSync(join(home, "CURRENT"), "utf8").trim());
  const manifest = JSON.parse(readFileSync(join(root, "manifest.json"), "utf8"));
  if (manifest.format !== 1 || manifest.base !== null || manifest.files["pre.onnx"]) throw new Error("this example reads full versions without pre.onnx");
  const request = JSON.parse(readFileSync(requestFile, "utf8"));
  const numbers = Object.fromEntries(Object.keys(manifest.tables).map((name, k) => [name, k]));

  // One HMGET for each partition, each row once; the sentinel first.
  const wanted = new Map();
  for (const lookup of manifest.lookups)
    for (const id of idsOf(lookup, request)) {
      const { rows } = manifest.tables[lookup.table];
      if (id < 0n || id >= BigInt(rows)) throw new Error(`id ${id} is not a row of table ${lookup.table}, which has ${rows}`);
      const k = partitionOf(numbers[lookup.table], id), key = `${numbers[lookup.table]}/${id}`;
      if (!wanted.has(k)) wanted.set(k, new Map());
      wanted.get(k).set(key, field(numbers[lookup.table], id));
    }
  const nodes = address.split(",").map((each) => ({ host: each.split(":")[0], port: Number(each.split(":")[1]) }));
  const cluster = new Redis.Cluster(nodes, { redisOptions: { connectTimeout: 2000, commandTimeout: 2000 } });
  const found = new Map();
  try {
    await Promise.all([...wanted].map(async ([k, fields]) => {
      const key = `tw:${manifest.model}:${manifest.digest.slice(0, 16)}:{p${k}}`;
      const [seal, ...rows] = await cluster.hmgetBuffer(key, "m", ...fields.values());
      if (seal?.toString() !== `${manifest.digest}:${PARTITIONS}`) throw new Error(`partition ${k} is not whole: publish the version again`);
      [...fields.keys()].forEach((name, i) => found.set(name, rows[i]));
    }));
  } finally {
    cluster.disconnect();
  }

  // The inputs of dense.onnx: the model's own, rows of single lookups, and rows that stand side by side.
  const session = await ort.InferenceSession.create(join(root, "dense.onnx"));
  const feeds = {};
  for (const { name, dtype } of manifest.inputs)
    if (session.inputNames.includes(name)) {
      if (dtype !== "float32") throw new Error(`dense inputs of type ${dtype} are not fed by this example`);
      feeds[name] = new ort.Tensor("float32", Float32Array.from(request[name].data), request[name].shape);
    }
  const groups = [...manifest.joins];
  manifest.lookups.forEach((lookup, k) => {
    if (session.inputNames.includes(lookup.rows)) groups.push({ rows: lookup.rows, lookups: [k], stacked: false });
  });
  for (const { rows, lookups, stacked } of groups) {
    const { dim } = manifest.lookups[lookups[0]], count = lookups.length;
    const ids = lookups.map((k) => idsOf(manifest.lookups[k], request)), batch = ids[0].length;
    const out = new Float32Array(batch * count * dim);
    for (let row = 0; row < batch; row++)
      lookups.forEach((k, j) => {
        const { table } = manifest.lookups[k];
        decode(found.get(`${numbers[table]}/${ids[j][row]}`), manifest.tables[table], out, (row * count + j) * dim);
      });
    feeds[rows] = new ort.Tensor("float32", out, stacked ? [batch, count, dim] : [batch, count * dim]);
  }
  const results = await session.run(feeds);
  const outputs = session.outputNames.map((name, k) => [manifest.outputs[k].name, { shape: results[name].dims, data: [...results[name].data].map(Number) }]);
  console.log(JSON.stringify(Object.fromEntries(outputs)));
}

await main(process.argv.slice(2));
