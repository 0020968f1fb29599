/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0
 *
 * The ABI between the BPF programs and user space: every struct, enum and
 * constant both sides share, and nothing else.  pycopy/abi.py is its twin;
 * tests/bpf/test_abi.py compares sizes and offsets.  Change one, change both,
 * and raise PYCOPY_ABI_VERSION: the same records travel over the channel
 * between hosts (pycopy/channel.py), so an old peer must be able to refuse.
 *
 * Byte order: host order, except `key`, which is raw network-order bytes so
 * that user space can use it as a dictionary key without touching it.
 */
#ifndef PYCOPY_H
#define PYCOPY_H

#define PYCOPY_ABI_VERSION 2

/* Whose segment a record describes. */
enum pycopy_kind {
	PYCOPY_CLIENT = 1, /* client to online server, payload follows */
	PYCOPY_TARGET = 2, /* target to copied client, header only */
	/* A router to a copied client: what it sent the target is larger than the path
	 * takes.  Only key, family, seq (of the segment that was too large), mss (the next
	 * hop's MTU, at most 65535) and time_ns say something.
	 */
	PYCOPY_TOO_BIG = 3,
};

/* Bits of pycopy_segment.options: which TCP options were present. */
#define PYCOPY_OPT_MSS		0x01
#define PYCOPY_OPT_WSCALE	0x02
#define PYCOPY_OPT_SACK_PERM	0x04
#define PYCOPY_OPT_TIMESTAMPS	0x08

/* The identity of a connection, the same bytes seen from either direction:
 * the client's side first, whoever sent the segment.  IPv4 addresses are
 * IPv4-mapped (::ffff:a.b.c.d, RFC 4291 2.5.5.2).
 */
struct pycopy_key {
	__u8 client_addr[16];
	__u8 server_addr[16];
	__u8 client_port[2];
	__u8 server_port[2];
};

/* One segment, client's or target's.  For a client segment payload_bytes of
 * payload follow the struct in the ring record; for a target segment none do.
 * A super-segment with more than PYCOPY_PIECE_BYTES of payload becomes several
 * records, each with its own seq and seg_len; FIN and PSH only on the last.
 */
struct pycopy_segment {
	__u64 time_ns;		/* CLOCK_MONOTONIC at the hook */
	__u8 kind;		/* enum pycopy_kind */
	__u8 tcp_flags;		/* as in the header: FIN 1 SYN 2 RST 4 PSH 8 ACK 16 URG 32 ECE 64 CWR 128 */
	__u8 options;		/* PYCOPY_OPT_* */
	__u8 wscale;		/* window scale option of a SYN, 0 if absent */
	__u16 service;		/* index of the -x entry that matched (client), else 0 */
	__u16 wnd;		/* window field, unscaled */
	__u32 seq;
	__u32 ack;
	__u32 tsval;		/* 0 unless PYCOPY_OPT_TIMESTAMPS */
	__u32 tsecr;
	__u32 seg_len;		/* payload bytes this record stands for */
	__u32 payload_bytes;	/* payload bytes that follow in the record */
	__u16 mss;		/* MSS option of a SYN, 0 if absent; PYCOPY_TOO_BIG: an MTU */
	__u8 family;		/* 4 or 6 */
	__u8 sack_blocks;	/* valid blocks in sack[], 0..4 */
	struct pycopy_key key;
	__u32 sack[8];		/* left and right edges (RFC 2018 3) */
};

#define PYCOPY_PIECE_BYTES 16384

/* Per-CPU counters of capture.c (map "counts").
 * SELECTED + EXTRA_PIECES = CAPTURED + PURE_ACK + FILTERED + FRAGMENT +
 * TRUNCATED + MALFORMED + RING_FULL, always.
 */
enum pycopy_capture_count {
	PYCOPY_CAP_SELECTED = 0,  /* TCP segments to a copied service, and every TCP fragment */
	PYCOPY_CAP_EXTRA_PIECES,  /* records beyond the first of a cut super-segment */
	PYCOPY_CAP_CAPTURED,	  /* records put into the ring */
	PYCOPY_CAP_PURE_ACK,	  /* ACKs that carry nothing the session engine needs */
	PYCOPY_CAP_FILTERED,	  /* rejected by the user's -F expression */
	PYCOPY_CAP_FRAGMENT,	  /* IP fragments of TCP: their ports are not all readable */
	PYCOPY_CAP_TRUNCATED,	  /* headers or payload end before their own lengths say */
	PYCOPY_CAP_MALFORMED,	  /* lengths or options that contradict themselves */
	PYCOPY_CAP_RING_FULL,	  /* user space was too slow: lost, and counted here */
	PYCOPY_CAP_COUNTS
};

/* Per-CPU counters of intercept.c (map "counts").
 * MATCHED = CAPTURED + PASSED + FRAGMENT + TRUNCATED + MALFORMED + RING_FULL + TOO_BIG.
 */
enum pycopy_intercept_count {
	PYCOPY_INT_MATCHED = 0,	  /* TCP segments that the filter selects, and TOO_BIG */
	PYCOPY_INT_CAPTURED,	  /* records put into the ring, then swallowed */
	PYCOPY_INT_PASSED,	  /* not a replay's: left alone */
	PYCOPY_INT_FRAGMENT,	  /* fragments: swallowed if a replay's by address, never recorded */
	PYCOPY_INT_TRUNCATED,
	PYCOPY_INT_MALFORMED,
	PYCOPY_INT_RING_FULL,	  /* treated as ever, but its record was lost */
	PYCOPY_INT_TOO_BIG,	  /* ICMP about a copy: recorded, and let through */
	PYCOPY_INT_COUNTS
};

/* LPM trie "claims" of intercept.c: what to do with a response by its
 * destination.  No entry: the value of claims_default[0] decides.
 */
enum pycopy_claim {
	PYCOPY_PASS = 0,
	PYCOPY_SWALLOW = 1,
};

struct pycopy_claim_key {
	__u32 prefix_bits;	/* 0..128, IPv4-mapped for IPv4 (96 + n) */
	__u8 addr[16];
};

#endif
