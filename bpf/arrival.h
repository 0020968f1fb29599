/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0
 *
 * A response of the target comes to a session that the kernel keeps: the healthy case of
 * session.on_target_segment() and pycopy/session/arrival.py, receiving.py and recovery.py.
 * Under the session's lock.
 */
#ifndef PYCOPY_ARRIVAL_H
#define PYCOPY_ARRIVAL_H

#include "session.h"

/* What a SYN without the option means. */
static __always_inline u32 pycopy_default_mss(u8 family)
{
	return family == 4 ? PYCOPY_DEFAULT_MSS_IPV4 : PYCOPY_DEFAULT_MSS_IPV6;
}

/* recovery.sample_rtt(): RFC 6298 2. */
static __always_inline void pycopy_sample_rtt(struct pycopy_session *s,
					      const struct pycopy_fast_config *config, s64 rtt_ns)
{
	s64 off = (s64)s->srtt_ns - rtt_ns;
	u64 rto_ns;

	if (!s->srtt_ns) {
		s->srtt_ns = rtt_ns;
		s->rttvar_ns = (u64)rtt_ns / 2;
	} else {
		if (off < 0)
			off = -off;
		s->rttvar_ns += (off - (s64)s->rttvar_ns) >> 2;
		s->srtt_ns += (rtt_ns - (s64)s->srtt_ns) >> 3;
	}
	rto_ns = s->srtt_ns + 4 * s->rttvar_ns;
	if (rto_ns < config->rto_min_ns)
		rto_ns = config->rto_min_ns;
	if (rto_ns > config->rto_max_ns)
		rto_ns = config->rto_max_ns;
	s->rto_ns = rto_ns;
}

/* recovery.on_new_ack() where nothing was lost: RFC 5681 3.1, RFC 7661. */
static __always_inline void pycopy_grow_cwnd(struct pycopy_session *s, u32 acked_bytes)
{
	u64 grown = acked_bytes;

	if (2 * (u64)(pycopy_in_flight(s) + acked_bytes) < s->cwnd)
		return;
	if (s->cwnd < s->ssthresh) {
		if (grown > 2 * s->smss)
			grown = 2 * s->smss;
	} else {
		grown = (u64)s->smss * acked_bytes / (s->cwnd ? s->cwnd : 1);
		if (!grown)
			grown = 1;
	}
	if (s->cwnd < PYCOPY_NO_SSTHRESH)
		s->cwnd += grown;
}

/* The target acknowledged everything before `ack`: arrival._advance(). */
static __always_inline void pycopy_acknowledged(struct pycopy_session *s,
						const struct pycopy_fast_config *config, u32 ack,
						u64 now_ns)
{
	u32 acked_bytes = ack - s->snd_una;

	s->snd_una = ack;
	if (s->known & PYCOPY_KNOWN_TIME && (s32)(ack - s->timed_end) >= 0) {
		s->known &= ~PYCOPY_KNOWN_TIME;
		pycopy_sample_rtt(s, config, now_ns > s->timed_ns ? now_ns - s->timed_ns : 1);
	}
	pycopy_grow_cwnd(s, acked_bytes);
	s->progress_ns = now_ns;
	s->rto_at = pycopy_in_flight(s) ? now_ns + s->rto_ns : 0;
}

/* arrival._establish() */
static __always_inline int pycopy_establish(struct pycopy_session *s,
					    const struct pycopy_fast_config *config,
					    const struct pycopy_segment *segment, u64 now_ns)
{
	const u8 wanted = PYCOPY_TCP_SYN | PYCOPY_TCP_ACK;
	u32 mss = segment->mss ? segment->mss : pycopy_default_mss(s->family);

	if ((segment->tcp_flags & (wanted | PYCOPY_TCP_RST | PYCOPY_TCP_FIN)) != wanted ||
	    segment->ack != s->snd_nxt || segment->seg_len)
		return pycopy_leave(s, PYCOPY_LEFT_RESPONSE);
	s->irs = segment->seq;
	s->rcv_nxt = s->rcv_acked = s->answered = segment->seq + 1;
	s->rcv_acked--;
	s->options &= segment->options;
	if (s->options & PYCOPY_OPT_WSCALE)
		s->snd_wscale = segment->wscale;
	else
		s->rcv_wscale = 0;
	if (mss < PYCOPY_MIN_MSS)
		mss = PYCOPY_MIN_MSS;
	if (mss < s->mss)
		s->mss = mss;
	s->smss = s->mss;
	if (s->options & PYCOPY_OPT_TIMESTAMPS)
		s->smss -= PYCOPY_TIMESTAMPS_BYTES;
	s->ts_recent = segment->tsval;
	pycopy_acknowledged(s, config, segment->ack, now_ns);
	s->cwnd = PYCOPY_INITIAL_WINDOW * s->smss;
	s->ssthresh = PYCOPY_NO_SSTHRESH;
	s->snd_wnd = segment->wnd; /* RFC 7323 2.2: never scaled in a SYN */
	s->snd_wl1 = segment->seq;
	s->snd_wl2 = segment->ack;
	s->state = pycopy_next_state(s->state, PYCOPY_EVENT_SYN_ACK);
	s->ack_at = PYCOPY_AT_ONCE;
	return PYCOPY_STEERED;
}

/* Ours or the target's FIN is acknowledged or in order: with both, late segments are waited for. */
static __always_inline void pycopy_move(struct pycopy_session *s, enum pycopy_event event,
					const struct pycopy_fast_config *config, u64 now_ns)
{
	u8 state = pycopy_next_state(s->state, event);

	if (state == PYCOPY_TIME_WAIT)
		s->rto_at = now_ns + config->time_wait_ns;
	s->state = state;
}

/* Late segments of a session that is over: a repeated FIN is acknowledged again. */
static __always_inline int pycopy_after_the_end(struct pycopy_session *s,
						const struct pycopy_segment *segment)
{
	if (segment->seg_len || segment->tcp_flags & PYCOPY_TCP_FIN)
		s->ack_at = PYCOPY_AT_ONCE;
	return PYCOPY_DUPLICATE;
}

/* receiving.must_ack_now() */
static __always_inline int pycopy_must_ack_now(struct pycopy_session *s, u32 fin, u32 pushed)
{
	u32 unacked = s->rcv_nxt - s->rcv_acked, segments;

	if (fin)
		return 1;
	if (unacked < 2 * (u32)s->smss)
		return 0;
	segments = (unacked + s->smss - 1) / (s->smss ? s->smss : 1);
	if (segments > PYCOPY_STRETCH_MAX)
		segments = PYCOPY_STRETCH_MAX;
	if (s->stretch < 0)
		s->stretch++;
	else if ((s32)segments > s->stretch)
		s->stretch = segments;
	else
		return !pushed;
	return 1;
}

/* Why a segment makes the session leave, or a number that is no reason. */
static __always_inline u16 pycopy_objects(const struct pycopy_session *s,
					  const struct pycopy_segment *segment, u32 end, u32 wnd)
{
	s32 ahead = segment->seq - s->rcv_nxt;

	if (segment->sack_blocks)
		return PYCOPY_LEFT_DUP_ACK;
	if (!(segment->tcp_flags & PYCOPY_TCP_ACK) || (s32)(segment->ack - s->snd_nxt) > 0 ||
	    (end != segment->seq && ahead > 0))
		return PYCOPY_LEFT_RESPONSE;
	if (segment->ack == s->snd_una && pycopy_in_flight(s) && end == segment->seq &&
	    wnd == s->snd_wnd)
		return PYCOPY_LEFT_DUP_ACK;
	return PYCOPY_LEFT_REASONS;
}

/* An acknowledgement that is not older than the last one, and the window that comes with it. */
static __always_inline void pycopy_take_ack(struct pycopy_session *s,
					    const struct pycopy_fast_config *config,
					    const struct pycopy_segment *segment, u32 wnd,
					    u64 now_ns)
{
	if (segment->ack != s->snd_una) {
		pycopy_acknowledged(s, config, segment->ack, now_ns);
		if (!pycopy_in_flight(s) && s->known & PYCOPY_KNOWN_FIN)
			pycopy_move(s, PYCOPY_EVENT_FIN_ACKED, config, now_ns);
	}
	/* RFC 9293 3.10.7.4: only a segment that is not older may change the window. */
	if ((s32)(segment->seq - s->snd_wl1) > 0 ||
	    (segment->seq == s->snd_wl1 && (s32)(segment->ack - s->snd_wl2) >= 0)) {
		s->snd_wnd = wnd;
		s->snd_wl1 = segment->seq;
		s->snd_wl2 = s->snd_una;
	}
}

/* Bytes or a FIN of the target, in order or repeated. */
static __always_inline int pycopy_receive(struct pycopy_session *s,
					  const struct pycopy_fast_config *config,
					  const struct pycopy_segment *segment, u32 end, u64 now_ns)
{
	u32 fin = !!(segment->tcp_flags & PYCOPY_TCP_FIN);

	if (!PYCOPY_MAY_RECEIVE(s->state) || (s32)(end - s->rcv_nxt) <= 0) {
		s->ack_at = PYCOPY_AT_ONCE; /* repeated: our ACK was lost */
		return PYCOPY_DUPLICATE;
	}
	s->rcv_nxt = end;
	if (s->known & PYCOPY_KNOWN_SENT && (s32)(s->snd_una - s->asked) < 0)
		s->said_before = end; /* an answer to those before */
	s->progress_ns = now_ns;
	if (pycopy_must_ack_now(s, fin, segment->tcp_flags & PYCOPY_TCP_PSH))
		s->ack_at = PYCOPY_AT_ONCE;
	else if (!s->ack_at)
		s->ack_at = now_ns + config->delayed_ack_ns;
	if (fin)
		pycopy_move(s, PYCOPY_EVENT_FIN_RECEIVED, config, now_ns);
	return PYCOPY_STEERED;
}

/* session.on_target_segment(): STEERED, DUPLICATE or LEAVE.  What it sets free is
 * found afterwards; an acknowledgement is due when ack_at says so.
 */
static __always_inline int pycopy_target_arrives(struct pycopy_session *s,
						 const struct pycopy_fast_config *config,
						 const struct pycopy_segment *segment, u64 now_ns)
{
	u32 end = segment->seq + segment->seg_len + !!(segment->tcp_flags & PYCOPY_TCP_FIN);
	u32 wnd = (u32)segment->wnd << (s->snd_wscale & 15);
	u8 was = s->state;
	u16 why;

	if (was == PYCOPY_SYN_SENT)
		return pycopy_establish(s, config, segment, now_ns);
	if (was == PYCOPY_TIME_WAIT)
		return pycopy_after_the_end(s, segment);
	if (segment->tcp_flags & PYCOPY_TCP_RST)
		return pycopy_leave(s, PYCOPY_LEFT_RESET);
	if (segment->tcp_flags & PYCOPY_TCP_SYN) {
		s->ack_at = PYCOPY_AT_ONCE; /* our ACK of the handshake was lost, or RFC 5961 4 */
		return PYCOPY_DUPLICATE;
	}
	why = pycopy_objects(s, segment, end, wnd);
	if (why < PYCOPY_LEFT_REASONS)
		return pycopy_leave(s, why);
	if ((s32)(segment->ack - s->snd_una) >= 0)
		pycopy_take_ack(s, config, segment, wnd, now_ns);
	/* RFC 9293 3.10.7.4: the end, whatever else is in the segment. */
	if (was == PYCOPY_LAST_ACK && s->state == PYCOPY_TIME_WAIT) {
		s->ack_at = 0;
		return PYCOPY_STEERED;
	}
	if ((s32)(segment->seq - s->rcv_acked) <= 0 && (s32)(segment->tsval - s->ts_recent) > 0)
		s->ts_recent = segment->tsval; /* RFC 7323 4.3 */
	if (end != segment->seq)
		return pycopy_receive(s, config, segment, end, now_ns);
	if ((s32)(segment->seq - s->rcv_nxt) < 0)
		s->ack_at = PYCOPY_AT_ONCE; /* keep-alive (RFC 9293 3.8.4), or window probe */
	return PYCOPY_STEERED;
}

#endif
