// A private Sigstore for tests: the certificate authority and certificate log of @sigstore/mock and a transparency log of
// two leaves behind HTTP, and @sigstore's own signer and verifier as a foreign implementation.
'use strict';
const { createRequire } = require('node:module');
const crypto = require('node:crypto');
const fs = require('node:fs');
const http = require('node:http');

const needed = createRequire(process.argv[2] + '/');
const read = () => JSON.parse(fs.readFileSync(0, 'utf8'));

const sha256 = (...parts) => parts.reduce((made, part) => made.update(part), crypto.createHash('sha256')).digest();

// A certificate in the one spelling of PEM that Rekor keeps.
const normal = (text) =>
  Buffer.from(new crypto.X509Certificate(Buffer.from(text, 'base64')).toString()).toString('base64');

// What Rekor keeps of a proposed entry: of an envelope only hashes, signatures and who verifies them.
function kept(entry) {
  const proposed = entry.spec.proposedContent;
  if (entry.kind !== 'dsse' || !proposed) return entry;
  const envelope = JSON.parse(proposed.envelope);
  const hash = (data) => ({ algorithm: 'sha256', value: sha256(data).toString('hex') });
  const signatures = envelope.signatures.map((one, at) => ({
    signature: one.sig,
    verifier: normal(proposed.verifiers[at] || proposed.verifiers[0]),
  }));
  const payloadHash = hash(Buffer.from(envelope.payload, 'base64'));
  const spec = { envelopeHash: hash(proposed.envelope), payloadHash, signatures };
  return { apiVersion: entry.apiVersion, kind: entry.kind, spec };
}

// A log whose second leaf is the entry.
function log(host, keys, canonicalize, entry, late) {
  const key = keys.publicKey.export({ format: 'der', type: 'spki' });
  const logID = sha256(key);
  const body = Buffer.from(canonicalize(kept(entry)));
  const integratedTime = Math.floor(Date.now() / 1000) + late;
  const first = sha256(Buffer.from([0]), 'the first leaf');
  const root = sha256(Buffer.from([1]), first, sha256(Buffer.from([0]), body));
  const note = `${host} - 1\n2\n${root.toString('base64')}\n`;
  const mark = Buffer.concat([logID.subarray(0, 4), crypto.sign('sha256', Buffer.from(note), keys.privateKey)]);
  const promised = { body: body.toString('base64'), integratedTime, logID: logID.toString('hex'), logIndex: 1 };
  const set = crypto.sign('sha256', Buffer.from(canonicalize(promised)), keys.privateKey);
  const inclusionProof = {
    logIndex: 1,
    treeSize: 2,
    rootHash: root.toString('hex'),
    hashes: [first.toString('hex')],
    checkpoint: `${note}\n\u2014 ${host} ${mark.toString('base64')}\n`,
  };
  const verification = { inclusionProof, signedEntryTimestamp: set.toString('base64') };
  return { [crypto.randomBytes(32).toString('hex')]: { ...promised, verification } };
}

async function serve() {
  const mock = needed('@sigstore/mock');
  const pair = () => crypto.generateKeyPairSync('ec', { namedCurve: 'P-256' });
  const ctlog = await mock.initializeCTLog(pair());
  const ca = await mock.initializeCA(pair(), ctlog);
  const canonicalize = needed('canonicalize');
  const keys = pair();
  const handlers = {};
  const server = http.createServer((request, response) => {
    const parts = [];
    request.on('data', (part) => parts.push(part));
    request.on('end', async () => {
      const handler = handlers[request.url];
      if (!handler) return response.writeHead(404).end();
      let body = Buffer.concat(parts).toString();
      const bearer = (request.headers.authorization || '').replace(/^Bearer /, '');
      if (bearer) {
        // What Fulcio takes and the mock does not: the token in a header, the request as base64 of PEM.
        const certificateSigningRequest = Buffer.from(JSON.parse(body).certificateSigningRequest, 'base64').toString();
        body = JSON.stringify({ certificateSigningRequest, credentials: { oidcIdentityToken: bearer } });
      }
      const done = await handler.fn(body);
      if (done.statusCode >= 400) process.stderr.write(`${request.url}: ${done.response}\n`);
      response.writeHead(done.statusCode, { 'Content-Type': done.contentType || 'application/json' });
      response.end(done.response);
    });
  });
  await new Promise((ready) => server.listen(0, '127.0.0.1', ready));
  const url = `http://127.0.0.1:${server.address().port}`;
  const fulcio = mock.fulcioHandler(ca);
  handlers[fulcio.path] = fulcio;
  const rekor = (late) => async (body) => {
    const made = log(new URL(url).host, keys, canonicalize, JSON.parse(body), late);
    return { statusCode: 201, response: JSON.stringify(made) };
  };
  handlers['/api/v1/log/entries'] = { fn: rekor(0) };
  handlers['/late/api/v1/log/entries'] = { fn: rekor(86400) }; // when the certificate has expired
  const other = await mock.initializeCA(pair(), ctlog);
  const start = new Date(Date.now() - 3600000).toISOString();
  const described = (base, key) => ({
    baseUrl: base,
    hashAlgorithm: 'SHA2_256',
    publicKey: { rawBytes: key.toString('base64'), keyDetails: 'PKIX_ECDSA_P256_SHA_256', validFor: { start } },
    logId: { keyId: sha256(key).toString('base64') },
  });
  const trustedRoot = {
    mediaType: 'application/vnd.dev.sigstore.trustedroot+json;version=0.1',
    tlogs: [described(url, keys.publicKey.export({ format: 'der', type: 'spki' }))],
    certificateAuthorities: [
      {
        subject: { organization: 'sigstore.mock', commonName: 'sigstore' },
        uri: url,
        certChain: { certificates: [{ rawBytes: ca.rootCertificate.toString('base64') }] },
        validFor: { start },
      },
    ],
    ctlogs: [described(`${url}/ct`, ctlog.publicKey)],
    timestampAuthorities: [],
  };
  const service = { url, majorApiVersion: 1, validFor: { start }, operator: 'mock' };
  const signingConfig = {
    mediaType: 'application/vnd.dev.sigstore.signingconfig.v0.2+json',
    caUrls: [service],
    oidcUrls: [service],
    rekorTlogUrls: [service],
    rekorTlogConfig: { selector: 'ANY' },
    tsaUrls: [],
    tsaConfig: { selector: 'ANY' },
  };
  const otherAuthority = other.rootCertificate.toString('base64');
  process.stdout.write(JSON.stringify({ url, trustedRoot, signingConfig, otherAuthority }) + '\n');
}

async function sign() {
  const { url, token, payload } = read();
  const { DSSEBundleBuilder, FulcioSigner, RekorWitness } = needed('@sigstore/sign');
  const { bundleToJSON } = needed('@sigstore/bundle');
  const signer = new FulcioSigner({ fulcioBaseURL: url, identityProvider: { getToken: async () => token } });
  const witness = new RekorWitness({ rekorBaseURL: url, entryType: 'dsse' });
  const builder = new DSSEBundleBuilder({ signer, witnesses: [witness] });
  const bundle = await builder.create({ data: Buffer.from(payload), type: 'application/vnd.in-toto+json' });
  process.stdout.write(JSON.stringify(bundleToJSON(bundle)));
}

function verify() {
  const { bundle, trustedRoot, identity, issuer, key } = read();
  const { bundleFromJSON } = needed('@sigstore/bundle');
  const { Verifier, toSignedEntity, toTrustMaterial } = needed('@sigstore/verify');
  const { TrustedRoot } = needed('@sigstore/protobuf-specs');
  const keys = () => ({ publicKey: crypto.createPublicKey(key), validFor: () => true });
  const material = toTrustMaterial(TrustedRoot.fromJSON(trustedRoot), key ? keys : undefined);
  const options = key ? { tlogThreshold: 0, ctlogThreshold: 0, timestampThreshold: 0 } : {};
  const verifier = new Verifier(material, options);
  const policy = key ? undefined : { subjectAlternativeName: identity, extensions: { issuer } };
  const signer = verifier.verify(toSignedEntity(bundleFromJSON(bundle)), policy);
  process.stdout.write(JSON.stringify({ identity: signer.identity || null }));
}

Promise.resolve({ serve, sign, verify }[process.argv[3]]()).catch((error) => {
  process.stderr.write(String(error && error.stack ? error.stack : error) + '\n');
  process.exit(1);
});
