/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0
 *
 * The ABI between the BPF programs and user space: every struct, enum and
 * constant both sides share, and nothing else.  pycopy/kernel/abi.py and, for the maps,
 * pycopy/kernel/shapes.py are its twins; tests/bpf/test_abi.py compares them.  A session is
 * declared in pycopy/session/fields.py (generated.h).  Change one, change both, and raise
 * PYCOPY_ABI_VERSION: the same records travel over the channel between hosts
 * (pycopy/channel/), so an old peer must be able to refuse.
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
#define PYCOPY_OPT_MSS	      0x01
#define PYCOPY_OPT_WSCALE     0x02
#define PYCOPY_OPT_SACK_PERM  0x04
#define PYCOPY_OPT_TIMESTAMPS 0x08

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
	__u64 time_ns;	/* CLOCK_MONOTONIC at the hook */
	__u8 kind;	/* enum pycopy_kind */
	__u8 tcp_flags; /* FIN 1 SYN 2 RST 4 PSH 8 ACK 16 URG 32 ECE 64 CWR 128 */
	__u8 options;	/* PYCOPY_OPT_* */
	__u8 wscale;	/* window scale option of a SYN, 0 if absent */
	__u16 service;	/* index of the -x entry that matched (client), else 0 */
	__u16 wnd;	/* window field, unscaled */
	__u32 seq;
	__u32 ack;
	__u32 tsval; /* 0 unless PYCOPY_OPT_TIMESTAMPS */
	__u32 tsecr;
	__u32 seg_len;	     /* payload bytes this record stands for */
	__u32 payload_bytes; /* payload bytes that follow in the record */
	__u16 mss;	     /* MSS option of a SYN, 0 if absent; PYCOPY_TOO_BIG: an MTU */
	__u8 family;	     /* 4 or 6 */
	__u8 sack_blocks;    /* valid blocks in sack[], 0..4 */
	struct pycopy_key key;
	__u32 sack[8]; /* left and right edges (RFC 2018 3) */
};

#define PYCOPY_PIECE_BYTES 16384

/* --- What the programs are linked with: pycopy/kernel/objects.py ---
 *
 * Objects are compiled once and for everybody.  What differs from run to run is filled in
 * when one is loaded: maps, by number; a few sizes, as constants; the user's -F, as a
 * function.  All else that a run is about lies in maps.
 */

/* Maps: numbers that the text has in place of descriptors. */
enum pycopy_map {
	PYCOPY_MAP_SEGMENTS = 1, /* records: a ring buffer, or a perf event array */
	PYCOPY_MAP_COUNTS,
	PYCOPY_MAP_SCRATCH,
	PYCOPY_MAP_SETTINGS,
	PYCOPY_MAP_HEARTBEAT,
	/* capture.c */
	PYCOPY_MAP_SERVICE_PORTS,
	PYCOPY_MAP_SERVICES,
	PYCOPY_MAP_LOCAL_ADDRESSES,
	PYCOPY_MAP_HANDSHAKES,
	/* intercept.c */
	PYCOPY_MAP_SERVERS,
	PYCOPY_MAP_OURS,
	PYCOPY_MAP_CLAIMS,
	PYCOPY_MAP_CLAIMS_DEFAULT,
	PYCOPY_MAP_RELAYS,
	PYCOPY_MAP_RELAY_WORK,
	/* progress.c */
	PYCOPY_MAP_INTERCEPTS,
	PYCOPY_MAP_COOKIE,
	PYCOPY_MAP_PROBES,
	/* the kernel's sessions: pycopy/fastpath/maps.py */
	PYCOPY_MAP_SESSIONS,
	PYCOPY_MAP_FLOWS,
	PYCOPY_MAP_TARGETS,
	PYCOPY_MAP_ENDED,
	PYCOPY_MAP_SLOTS,
	PYCOPY_MAP_LINGERING,
	PYCOPY_MAP_PENDING,
	PYCOPY_MAP_LOG,
	PYCOPY_MAP_HOPS,
	PYCOPY_MAP_CONFIG,
	PYCOPY_MAP_FAST_COUNTS,
	PYCOPY_MAP_WORK,
	PYCOPY_MAP_ATTENTION,
	PYCOPY_MAP_PORTS,
	PYCOPY_MAP_NEXT_PORT,
	PYCOPY_MAP_POOL,
	PYCOPY_MAP_CURSORS,
};

/* Constants: sizes that depend on the host, which the verifier has to know. */
enum pycopy_constant {
	PYCOPY_CONSTANT_PERF = 1, /* records leave by perf event output, not by a ring buffer */
	PYCOPY_CONSTANT_LOG_MASK, /* bytes of one CPU's log, a power of two, less one */
	PYCOPY_CONSTANT_SLOTS,	  /* entries of "sessions" */
};

/* Marks that the linker finds: a source register that no kernel knows, in a load of a 64-bit
 * constant, and a helper's number that no kernel has.
 */
#define PYCOPY_LINK_CONSTANT 15
#define PYCOPY_LINK_FILTER   0x70790001

/* Map "settings", one entry. */
struct pycopy_settings {
	__u32 worker; /* which of so many workers' flows are these */
	__u32 workers;
	__u16 port_lo; /* zero-route mode: ports that copies may leave from */
	__u16 port_hi;
	__u16 channel_port;  /* of the intercept, 0: none */
	__u16 datagram_port; /* of the replay, for datagrams */
	__u8 redirect_away;  /* TC egress: a dropped packet would be told to the sender's TCP */
	__u8 reserved[7];
};

/* Map "heartbeat", one entry of 64 bits: when the process last went round its loop, by
 * CLOCK_MONOTONIC.  A process that is stopped, hangs or is gone misses it, and what it has left
 * attached falls still: the copying at once, the swallowing after a grace, since a response
 * that nobody swallows may reach a real client.
 */
#define PYCOPY_LAPSE_NS 2000000000ULL
#define PYCOPY_GRACE_NS 10000000000ULL

/* An address and port, IPv4-mapped and in network order: key of the maps "services" (value: the
 * index of a service at that very address), "servers" (the targets of the zero-route mode) and
 * "intercepts" (value: the index of one, and of its entry in "probes").
 */
struct pycopy_endpoint {
	__u8 addr[16];
	__u8 port[2];
	__u8 reserved[2];
};

/* Map "service_ports": for each port what is copied of it.  0: nothing; else these bits, and
 * below them the index of the service that has no address.
 */
#define PYCOPY_PORT_OWN	     0x10000 /* at any address of this host ("local_addresses") */
#define PYCOPY_PORT_ANYBODYS 0x20000 /* at any address at all */
#define PYCOPY_PORT_GIVEN    0x40000 /* and, first, at addresses that are in "services" */
#define PYCOPY_PORT_INDEX    0xffff

/* Per-CPU counters of capture.c (map "counts").
 * SELECTED + EXTRA_PIECES = CAPTURED + PURE_ACK + FILTERED + FRAGMENT +
 * TRUNCATED + MALFORMED + RING_FULL + KEPT + LAPSED, always.
 */
enum pycopy_capture_count {
	PYCOPY_CAP_SELECTED = 0, /* TCP segments to a copied service, and every TCP fragment */
	PYCOPY_CAP_EXTRA_PIECES, /* records beyond the first of a cut super-segment */
	PYCOPY_CAP_CAPTURED,	 /* records put into the ring */
	PYCOPY_CAP_PURE_ACK,	 /* ACKs that carry nothing the session engine needs */
	PYCOPY_CAP_FILTERED,	 /* rejected by the user's -F expression */
	PYCOPY_CAP_FRAGMENT,	 /* IP fragments of TCP: their ports are not all readable */
	PYCOPY_CAP_TRUNCATED,	 /* headers or payload end before their own lengths say */
	PYCOPY_CAP_MALFORMED,	 /* lengths or options that contradict themselves */
	PYCOPY_CAP_RING_FULL,	 /* user space was too slow: lost, and counted here */
	PYCOPY_CAP_KEPT,	 /* taken by a session of the kernel's own (PYCOPY_FAST_CLIENT) */
	PYCOPY_CAP_LAPSED,	 /* user space has missed its heartbeat: nothing is copied */
	PYCOPY_CAP_COUNTS
};

/* Per-CPU counters of intercept.c and of progress.c (map "counts").
 * MATCHED = CAPTURED + PASSED + FRAGMENT + TRUNCATED + MALFORMED + RING_FULL + TOO_BIG + KEPT +
 * RELAYED + LAPSED.  In progress.c a datagram stands for a response, and one with a wrong cookie is
 * PASSED.
 */
enum pycopy_intercept_count {
	PYCOPY_INT_MATCHED = 0, /* TCP segments that the filter selects, and TOO_BIG */
	PYCOPY_INT_CAPTURED,	/* records put into the ring, then swallowed */
	PYCOPY_INT_PASSED,	/* not a replay's: left alone */
	PYCOPY_INT_FRAGMENT,	/* swallowed if a replay's by address, never recorded */
	PYCOPY_INT_TRUNCATED,
	PYCOPY_INT_MALFORMED,
	PYCOPY_INT_RING_FULL, /* treated as ever, but its record was lost */
	PYCOPY_INT_TOO_BIG,   /* ICMP about a copy: recorded, and let through */
	PYCOPY_INT_KEPT,      /* taken by a session of the kernel's own */
	PYCOPY_INT_RELAYED,   /* turned into a datagram to its replay, then swallowed */
	PYCOPY_INT_LAPSED,    /* a replay's, but nobody has been here for too long: passed */
	PYCOPY_INT_COUNTS
};

/* LPM trie "claims" of intercept.c: what to do with a response by its
 * destination.  No entry: the value of claims_default[0] decides.
 */
enum pycopy_claim {
	PYCOPY_PASS = 0,
	PYCOPY_SWALLOW = 1,
	PYCOPY_RELAY = 2, /* and above: swallow, by way of entry (value - 2) of "relays" */
};

struct pycopy_claim_key {
	__u32 prefix_bits; /* 0..128, IPv4-mapped for IPv4 (96 + n) */
	__u8 addr[16];
};

/* --- Responses straight from one kernel to the other: relay.h, progress.c --- */

#define PYCOPY_RELAYS 64

/* Where a replay's responses go: map "relays"; ifindex 0: nowhere, make records. */
struct pycopy_relay {
	__u64 cookie;
	__u32 ifindex;
	__u8 family;
	__u8 reserved;
	__u8 l2[14];
	__u8 source[16];
	__u8 destination[16];
	__be16 source_port;
	__be16 destination_port;
};

enum pycopy_datagram_kind {
	PYCOPY_RELAYED_SEGMENT = 1,
	PYCOPY_PROBE = 2, /* the way is open; its segment means nothing */
};

/* The payload of a datagram from an intercept to a replay (UDP, without a checksum). */
struct pycopy_datagram {
	__u64 cookie; /* the run's, from HELLO: who does not know it is nobody */
	/* Where a TCP header had its checksum, the datagram has this, being written over a
	 * response.  A device that was to complete that checksum does so here.
	 */
	__u16 junk;
	__u16 kind; /* enum pycopy_datagram_kind */
	__u32 reserved;
	struct pycopy_segment segment;
};

/* --- Sessions that the kernel keeps: fastpath.h, fastpath.c ---
 *
 * A session is the engine's (pycopy/session/) or the kernel's, never both's.  The
 * kernel opens it and hands it over, with its state, as soon as anything unusual
 * happens; user space gives it back when it is quiet.  The words are those of
 * pycopy/session/views.py, but sequence numbers stay 32 bits wide.
 */

/* Who moves a session on.  FREE > KERNEL > LEAVING > USER > KERNEL or FREE. */
enum pycopy_owner {
	PYCOPY_FREE = 0,
	PYCOPY_KERNEL = 1,
	PYCOPY_LEAVING = 2, /* handed over; user space has not fetched it yet */
	PYCOPY_USER = 3,
};

/* Why a session left the kernel. */
enum pycopy_left {
	PYCOPY_LEFT_ORDER = 0, /* a client segment out of order, or overlapping */
	PYCOPY_LEFT_RESET,     /* RST, of either side */
	PYCOPY_LEFT_TIMEOUT,   /* not acknowledged in time */
	PYCOPY_LEFT_DUP_ACK,   /* duplicate acknowledgement, or SACK blocks */
	PYCOPY_LEFT_RESPONSE,  /* a response that is not the next one, or not acceptable */
	PYCOPY_LEFT_QUEUE,     /* more to hold than the kernel holds */
	PYCOPY_LEFT_LOG,       /* no room in the log of sent segments */
	PYCOPY_LEFT_CLOSE,     /* a close that the two servers do not have in common */
	PYCOPY_LEFT_QUIET,     /* the target's answer is shorter: a matter of time */
	PYCOPY_LEFT_OPTIONS,   /* headers that the kernel does not rewrite */
	PYCOPY_LEFT_REUSED,    /* the client's port began another connection */
	PYCOPY_LEFT_HOP,       /* the next hop is not usable, or its segments are smaller */
	PYCOPY_LEFT_SILENT,    /* the long limits: -t, -k */
	PYCOPY_LEFT_ASKED,     /* user space asked for it */
	PYCOPY_LEFT_REASONS
};

/* Client segments that one session holds back at most: a list in the log. */
#define PYCOPY_HELD_MAX 4096

/* The session itself, its states and the numbers of its rules. */
#include "generated.h"

/* Value of the map "pending": a byte for each of so many sessions, 1 where something is pending,
 * else 0.  Bytes, since they can be set and cleared without an atomic operation, which kernels
 * before 5.12 have only for additions.
 */
#define PYCOPY_PENDING_SLOTS 64

struct pycopy_pending {
	__u64 words[PYCOPY_PENDING_SLOTS / 8];
};

/* The map "cursors": where the pass over pending sessions is, the one over all of them, and up to
 * where a pending one was ever found.
 */
#define PYCOPY_CURSORS	   3
#define PYCOPY_CURSOR_USED 2

/* Value of the maps "flows" (by the online key) and "targets" (by the target key). */
struct pycopy_flow {
	__u32 slot; /* index in "sessions", or PYCOPY_NO_SLOT: a session of user space's own */
	__u32 generation;
};

#define PYCOPY_NO_SLOT 0xffffffff

/* Entry of the queue "lingering": sessions in TIME_WAIT, in the order in which it ends. */
struct pycopy_lingering {
	__u32 slot;
	__u32 generation;
	__u64 until_ns;
};

/* A position in the log: CPU in the upper 16 bits, offset (never wrapping) below. */
#define PYCOPY_LOG_CPU_SHIFT 48

/* The client had received something since its segment before: a request begins here. */
#define PYCOPY_LOG_BOUNDARY 0x100

/* One client segment in the log, its payload behind it. */
struct pycopy_log_record {
	__u32 bytes; /* of the whole record, a multiple of 8 */
	__u32 slot;
	__u32 generation;
	__u32 seq;
	__u32 ack; /* the client's, of the online server's stream */
	__u32 seg_len;
	__u32 tcp_flags; /* of the segment, and PYCOPY_LOG_BOUNDARY */
	__u32 end;	 /* seq of what follows, FIN included */
	__u64 time_ns;	 /* when it was captured; once it is sent, when that was */
	__u64 before;	 /* the session's previous record */
	__u64 next;	 /* and the next one, if that is held */
};

/* The head of one CPU's log; PYCOPY_CONSTANT_LOG_MASK + 1 bytes of records and room for one
 * more follow.
 */
struct pycopy_log_head {
	__u64 head; /* offset of the next record */
	__u64 tail; /* offset of the oldest that may still be needed */
	__u64 reserved[6];
};

/* Longest payload of one frame made of the log: jumbo frames. */
#define PYCOPY_RELEASE_BYTES 9216

/* Behind the ring proper: a record may begin in its last byte, and a frame be made of any
 * part of it.
 */
#define PYCOPY_LOG_ROOM (PYCOPY_LOG_PAYLOAD + PYCOPY_RELEASE_BYTES + 1024)

/* Longest payload that the log takes. */
#define PYCOPY_LOG_PAYLOAD 65536

/* The way to a service's target: map "hops", by service. */
struct pycopy_hop {
	__u32 ifindex;
	__u8 usable;
	__u8 family; /* of the target */
	__u16 mss;   /* largest payload of one frame, options not counted */
	__u8 l2[14];
	__be16 target_port;
	__u8 source[16]; /* ours, where copies leave under our own address */
	__u8 target[16];
};

/* Map "fast_config", one entry; times in nanoseconds, as in pycopy/session/rules.py. */
struct pycopy_fast_config {
	__u64 now_ns; /* a test's clock; 0: the kernel's */
	__u64 quiet_ns;
	__u64 quiet_max_ns;
	__u64 delayed_ack_ns;
	__u64 rto_initial_ns;
	__u64 rto_min_ns;
	__u64 rto_max_ns;
	__u64 time_wait_ns;
	__u64 response_idle_ns;
	__u64 idle_ns;
	__u32 timestamp_origin;
	__u32 closed; /* non-zero: open no session */
	__u32 wait_for_response;
	__u32 ports; /* how many are in map "ports"; 0: the client's own port */
	__u32 pool4; /* how many networks of each family are in map "pool"; both 0: the */
	__u32 pool6; /* client's own address */
};

/* Networks of one family in map "pool"; IPv6's follow IPv4's. */
#define PYCOPY_POOL_NETWORKS 16

/* A network of -c: its first host, and how many hosts those before it have, which an entry
 * behind the last one says of all.
 */
struct pycopy_pool {
	__u64 high; /* of the address */
	__u64 low;
	__u64 before;
};

/* What fastpath.c is asked to do with a session, by user space. */
enum pycopy_request {
	PYCOPY_TAKE = 1, /* it is LEAVING; its state comes back, what it logged stays */
	PYCOPY_HAVE = 2, /* it is USER's: the log has been read */
	PYCOPY_GIVE = 3, /* it becomes KERNEL's, with the state that comes along */
	PYCOPY_DROP = 4, /* its slot becomes free: of one of user space's, or in TIME_WAIT */
	PYCOPY_FILL = 5, /* PYCOPY_FILL_SLOTS slots from this one on are free; for the start */
};

#define PYCOPY_FILL_SLOTS 256

struct pycopy_command {
	__u32 request; /* enum pycopy_request; 0 comes back if it was done */
	__u32 slot;
	__u32 generation;
	__u32 reserved;
	__u8 session[sizeof(struct pycopy_session)];
};

/* Entry of the queue "attention": a session that user space must fetch. */
struct pycopy_attention {
	__u32 slot;
	__u32 generation;
};

/* Values of the per-CPU maps "work", "scratch" and "relay_work": what does not fit on a
 * program's stack, with room to spare.
 */
#define PYCOPY_WORK_BYTES	512
#define PYCOPY_SCRATCH_BYTES	17152
#define PYCOPY_RELAY_WORK_BYTES 256

/* How the timer is run: __sk_buff.mark going in, and coming out as the return value. */
enum pycopy_timer {
	PYCOPY_TIMER_BEGIN = 1,	    /* a new pass over the sessions with something pending */
	PYCOPY_TIMER_BEGIN_ALL = 2, /* over all sessions */
	PYCOPY_TIMER_GO_ON = 3,
	PYCOPY_TIMER_GO_ON_ALL = 4,
	PYCOPY_TIMER_DONE = 5,
};

/* Beside it: the pass has seen sessions that have something pending. */
#define PYCOPY_TIMER_PENDING   0x100
#define PYCOPY_TIMER_HELD      0x200 /* a request, which may wait for nothing else */
#define PYCOPY_TIMER_ATTENTION 0x400 /* the queue "attention" has an entry */
#define PYCOPY_TIMER_SEEN      0x700

/* Per-CPU counters of the kernel's sessions (map "fast_counts").
 * CLIENT = SENT_AT_ONCE + HELD + STEERED + DUPLICATE; of HELD, RELEASED have been sent.
 * RESPONSES = RESPONSES_STEERED + RESPONSES_DUPLICATE.
 */
enum pycopy_fast_count {
	PYCOPY_FAST_CLIENT = 0, /* client segments taken */
	PYCOPY_FAST_SENT_AT_ONCE,
	PYCOPY_FAST_HELD,
	PYCOPY_FAST_RELEASED,
	PYCOPY_FAST_STEERED,
	PYCOPY_FAST_DUPLICATE,
	PYCOPY_FAST_SYN,
	PYCOPY_FAST_PAYLOAD,
	PYCOPY_FAST_PAYLOAD_BYTES,
	PYCOPY_FAST_RESPONSES,
	PYCOPY_FAST_RESPONSES_STEERED,
	PYCOPY_FAST_RESPONSES_DUPLICATE,
	PYCOPY_FAST_RESPONSE_PAYLOAD,
	PYCOPY_FAST_RESPONSE_FIN,
	PYCOPY_FAST_OPENED,
	PYCOPY_FAST_ESTABLISHED,
	PYCOPY_FAST_CLOSED,
	PYCOPY_FAST_TAKEN, /* sessions that user space has taken */
	PYCOPY_FAST_GIVEN,
	PYCOPY_FAST_RELEASED_BY_QUIET, /* the target's answer was shorter than the online one */
	PYCOPY_FAST_OUT_SEGMENTS,
	PYCOPY_FAST_OUT_PAYLOAD,
	PYCOPY_FAST_OUT_SYN,
	PYCOPY_FAST_OUT_FIN,
	PYCOPY_FAST_OUT_ACK,
	PYCOPY_FAST_OUT_FAILED, /* refused by the device: loss, for TCP to repair */
	PYCOPY_FAST_HOLD_TIME,	/* the first of PYCOPY_HOLD_BUCKETS */
	/* The first of LEFT_REASONS. */
	PYCOPY_FAST_LEFT = PYCOPY_FAST_HOLD_TIME + PYCOPY_HOLD_BUCKETS,
	PYCOPY_FAST_COUNTS = PYCOPY_FAST_LEFT + PYCOPY_LEFT_REASONS
};

#endif
