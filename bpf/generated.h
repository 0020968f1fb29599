/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0
 *
 * Generated: python3 -P -m pycopy.fastpath.generate
 *
 * A session as pycopy/session/ declares it: its fields (fields.py), its states and transitions
 * (states.py), and the numbers of its rules.
 */
#ifndef PYCOPY_GENERATED_H
#define PYCOPY_GENERATED_H
/* clang-format off */

/* Numbers of the rules. */
#define PYCOPY_DEFAULT_MSS_IPV4  536        /* RFC 9293 3.7.1: a SYN without the option */
#define PYCOPY_DEFAULT_MSS_IPV6  1220
#define PYCOPY_MIN_MSS           88         /* Linux's TCP_MIN_MSS */
#define PYCOPY_WSCALE_MAX        14         /* RFC 7323 2.3: use it for anything larger */
#define PYCOPY_TIMESTAMPS_BYTES  12         /* of every segment (RFC 7323 appendix A) */
#define PYCOPY_INITIAL_WINDOW    10         /* RFC 6928 2, in segments */
#define PYCOPY_NO_SSTHRESH       1073741824 /* bytes, more than any window has */
#define PYCOPY_STRETCH_MAX       32767      /* full-sized segments (receiving.py) */
#define PYCOPY_STRETCH_PAUSE     32
#define PYCOPY_QUIET_ROUND_TRIPS 4          /* release.quiet_deadline_ns() */
#define PYCOPY_AT_ONCE           1          /* a deadline long past: that one is not the timer's */
#define PYCOPY_HOLD_BUCKETS      7          /* of the hold-time histogram */

/* Bounds of the hold-time histogram, in nanoseconds; above, one more bucket. */
#define PYCOPY_HOLD_BOUNDS_NS(each) \
	each(100000ULL) each(1000000ULL) each(10000000ULL) each(100000000ULL) each(1000000000ULL) \
		each(10000000000ULL)

/* How a client's port is mixed to find its worker: factor, then shift. */
#define PYCOPY_WORKER_MIX(each) \
	each(0x7feb352d, 15) each(0x846ca68b, 16)

/* pycopy.session.states.State; TIME_WAIT is also what follows LAST_ACK. */
enum pycopy_state {
	PYCOPY_CLOSED = 1,
	PYCOPY_SYN_SENT = 2,
	PYCOPY_ESTABLISHED = 3,
	PYCOPY_FIN_WAIT_1 = 4,
	PYCOPY_FIN_WAIT_2 = 5,
	PYCOPY_CLOSING = 6,
	PYCOPY_CLOSE_WAIT = 7,
	PYCOPY_LAST_ACK = 8,
	PYCOPY_TIME_WAIT = 9,
};

/* What moves a session of the kernel's from one state to another. */
enum pycopy_event {
	PYCOPY_EVENT_OPEN = 1,
	PYCOPY_EVENT_SYN_ACK = 2,
	PYCOPY_EVENT_FIN_SENT = 3,
	PYCOPY_EVENT_FIN_ACKED = 4,
	PYCOPY_EVENT_FIN_RECEIVED = 5,
};

/* States in which the target may still send data (RFC 9293 3.10.7.4). */
#define PYCOPY_MAY_RECEIVE(state) \
	((state) == PYCOPY_ESTABLISHED || \
	 (state) == PYCOPY_FIN_WAIT_1 || \
	 (state) == PYCOPY_FIN_WAIT_2)

/* The state that follows; the same where the event means nothing. */
static __always_inline __u8 pycopy_next_state(__u8 state, enum pycopy_event event)
{
	if (event == PYCOPY_EVENT_OPEN) {
		if (state == PYCOPY_CLOSED)
			return PYCOPY_SYN_SENT;
	}
	if (event == PYCOPY_EVENT_SYN_ACK) {
		if (state == PYCOPY_SYN_SENT)
			return PYCOPY_ESTABLISHED;
	}
	if (event == PYCOPY_EVENT_FIN_SENT) {
		if (state == PYCOPY_ESTABLISHED)
			return PYCOPY_FIN_WAIT_1;
		if (state == PYCOPY_CLOSE_WAIT)
			return PYCOPY_LAST_ACK;
	}
	if (event == PYCOPY_EVENT_FIN_ACKED) {
		if (state == PYCOPY_FIN_WAIT_1)
			return PYCOPY_FIN_WAIT_2;
		if (state == PYCOPY_CLOSING)
			return PYCOPY_TIME_WAIT;
		if (state == PYCOPY_LAST_ACK)
			return PYCOPY_TIME_WAIT;
	}
	if (event == PYCOPY_EVENT_FIN_RECEIVED) {
		if (state == PYCOPY_ESTABLISHED)
			return PYCOPY_CLOSE_WAIT;
		if (state == PYCOPY_FIN_WAIT_1)
			return PYCOPY_CLOSING;
		if (state == PYCOPY_FIN_WAIT_2)
			return PYCOPY_TIME_WAIT;
	}
	return state;
}

/* Bits of pycopy_session.known. */
#define PYCOPY_KNOWN_IRS         0x1        /* the client has acknowledged */
#define PYCOPY_KNOWN_NEED        0x2        /* something was put in order */
#define PYCOPY_KNOWN_FIN         0x4        /* the client's FIN was captured */
#define PYCOPY_KNOWN_TIME        0x8        /* a round trip is being measured */
#define PYCOPY_KNOWN_SENT        0x10       /* something was sent */
#define PYCOPY_KNOWN_OVERLAP     0x20       /* its requests do not wait for responses, it seems */
#define PYCOPY_KNOWN_DOUBT       0x40       /* what was forgiven may have been a pause */

/* In brackets: the unit, or whose sequence number it is (the client's, the online
 * server's, the target's); in capitals the bit of `known` that it needs.
 */
struct pycopy_session {
	struct bpf_spin_lock lock;
	__u32 generation;          /* of the slot: what refers to an earlier one is stale */
	__u8 owner;                /* enum pycopy_owner */
	__u8 state;                /* enum pycopy_state */
	__u8 family;               /* 4 or 6, of the connection to the target */
	__u8 options;              /* PYCOPY_OPT_* in use with the target, or still offered */
	__u8 snd_wscale;           /* shift of the target's windows */
	__u8 rcv_wscale;           /* and of ours: the client's */
	__u16 held;                /* how many are held back, from held_at on [segments] */
	__u16 service;             /* index of the -x entry */
	__u16 mss;                 /* option of our SYN; then the smaller of both sides' [bytes] */
	__u16 smss;                /* the same less the options of every segment [bytes] */
	__u16 left;                /* enum pycopy_left, when not the kernel's any more */
	__u16 known;               /* PYCOPY_KNOWN_* */
	__s16 stretch;             /* that one ACK does for; below 0: a pause [segments] */
	__u32 iss;                 /* the client's first number, kept towards the target */
	__u32 online_irs;          /* the online server's [IRS] */
	__u32 online_snd_nxt;      /* next byte expected of the client [client] */
	__u32 online_rcv_nxt;      /* highest acknowledgement of the client [online, IRS] */
	__u32 online_need;         /* ack of the last segment put in order [online, NEED] */
	__u32 sent_need;           /* of the last one sent [online, SENT] */
	__u32 asked;               /* behind the last request sent [client, SENT] */
	__u32 irs;                 /* the target's first number */
	__u32 snd_una;             /* oldest byte that is not acknowledged [client] */
	__u32 snd_nxt;             /* next byte to send [client] */
	__u32 snd_wnd;             /* the target's window [bytes] */
	__u32 snd_wl1;             /* seq of the segment that said so [target] */
	__u32 snd_wl2;             /* and its ack [client] */
	__u32 rcv_nxt;             /* next byte expected of the target [target] */
	__u32 rcv_acked;           /* last acknowledged to it [target] */
	__u32 ts_recent;           /* the target's latest TSval in order (RFC 7323 4.3) */
	__u32 need_base;           /* of online responses that count as none, modulo 2^32 [bytes] */
	__u32 answered;            /* rcv_nxt when the last request was sent [target, SENT] */
	__u32 said_before;         /* rcv_nxt while the target had not got it yet [target, SENT] */
	__u32 cwnd;                /* congestion window (RFC 5681) [bytes] */
	__u32 ssthresh;            /* slow start threshold [bytes] */
	__u32 timed_end;           /* where the measured round trip ends [client, TIME] */
	__u32 held_sent;           /* what has left of the oldest held segment [bytes] */
	__u64 timed_ns;            /* when it began [TIME] */
	__u64 srtt_ns;             /* RFC 6298; 0: not measured yet */
	__u64 rttvar_ns;           /* its variation */
	__u64 rto_ns;              /* retransmission timeout */
	__u64 rto_at;              /* 0: not running; in TIME_WAIT: when it is over */
	__u64 ack_at;              /* 0: nothing to acknowledge; PYCOPY_AT_ONCE */
	__u64 progress_ns;         /* when the target last acknowledged or sent something new */
	__u64 client_ns;           /* when the client last spoke */
	__u64 log_last;            /* where the client's last segment is in the log, 0: nowhere */
	__u64 held_at;             /* and the oldest one held */
	__u64 asked_ns;            /* when the last request was captured, or else the SYN */
	__u64 client_rtt_ns;       /* from here to the client and back, 0: not known */
	struct pycopy_key online;  /* the connection online */
	struct pycopy_key target;  /* and ours to the target */
};

/* The slot of a session that `segment`, the client's SYN, opens: with nothing of the last one. */
static __always_inline void pycopy_reset(struct pycopy_session *s,
					 const struct pycopy_segment *segment,
					 const struct pycopy_key *target, __u32 generation,
					 __u8 family, __u16 mss, __u64 rto_ns, __u64 now_ns)
{
	s->generation = generation;
	s->owner = PYCOPY_KERNEL;
	s->state = PYCOPY_SYN_SENT;
	s->family = family;
	s->options = segment->options;
	s->snd_wscale = s->held = s->left = s->stretch = 0;
	s->online_irs = s->online_rcv_nxt = s->online_need = s->sent_need = 0;
	s->asked = s->irs = s->snd_wnd = s->snd_wl1 = 0;
	s->snd_wl2 = s->rcv_nxt = s->rcv_acked = s->ts_recent = 0;
	s->need_base = s->answered = s->said_before = s->held_sent = 0;
	s->srtt_ns = s->rttvar_ns = s->ack_at = s->log_last = 0;
	s->held_at = s->client_rtt_ns = 0;
	s->rcv_wscale = segment->wscale;
	s->service = segment->service;
	s->mss = s->smss = mss;
	s->known = PYCOPY_KNOWN_TIME;
	s->iss = s->snd_una = segment->seq;
	s->online_snd_nxt = s->snd_nxt = s->timed_end = segment->seq + 1;
	s->cwnd = PYCOPY_INITIAL_WINDOW * mss;
	s->ssthresh = PYCOPY_NO_SSTHRESH;
	s->timed_ns = s->progress_ns = s->client_ns = s->asked_ns = now_ns;
	s->rto_ns = rto_ns;
	s->rto_at = now_ns + rto_ns;
	s->online = segment->key;
	s->target = *target;
}

/* clang-format on */
#endif
