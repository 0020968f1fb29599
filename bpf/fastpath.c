// SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0
/*
 * What the kernel's sessions need besides packets: time, and user space's word.
 * Nothing is attached.  User space runs these with BPF_PROG_TEST_RUN:
 *
 * pycopy_timer: one step of a pass over the sessions that have something pending.
 * Run many times in one call (repeat), a session each; the packet it is given is
 * material for what has to be sent.  Acknowledgements that are due and held segments
 * are sent from here; a timeout, or a matter of judgement, is handed over.
 *
 * pycopy_control: takes a session away from the kernel, gives one back, or frees a
 * slot, atomically against everything that arrives meanwhile.
 */
#include "pump.h"

/* Groups of sessions without anything pending that one step passes over; of a sweep, slots that
 * are not the kernel's.
 */
#define PYCOPY_EMPTY_GROUPS 4
#define PYCOPY_EMPTY_SLOTS  32
/* Slots that a pass looks at beyond the last one it found pending.  The stack of free slots gives
 * out the lowest first, and a session is pending from the start: beyond a gap of as many as there
 * may be CPUs that take one at the same time, none was ever used.
 */
#define PYCOPY_SLOTS_AHEAD 1024

static __always_inline void pycopy_call_attention(const struct pycopy_flow *flow)
{
	struct pycopy_attention attention = {flow->slot, flow->generation};

	/* Full: the timer comes by again. */
	pycopy_map_push(PYCOPY_MAP(PYCOPY_MAP_ATTENTION), &attention, 0);
}

/* pycopy_next_slot() of a sweep: whatever session the kernel has. */
static __always_inline u32 pycopy_next_kept(u32 *at)
{
#pragma clang loop unroll(disable)
	for (u64 i = 0; i < PYCOPY_EMPTY_SLOTS; i++) {
		u32 slot = PYCOPY_FRESH(*at);
		struct pycopy_session *s = pycopy_lookup(PYCOPY_MAP_SESSIONS, &slot);

		PYCOPY_PIN(i);
		if (!s)
			break;
		*at = slot + 1;
		if (s->owner == PYCOPY_KERNEL || s->owner == PYCOPY_LEAVING)
			return slot;
	}
	return PYCOPY_NO_SLOT;
}

/* Which byte of a word, each 0 or 1, is the first that is not 0.  Without a branch: the lowest
 * bit moves the byte's number to the top.
 */
static __always_inline u32 pycopy_lowest_byte(u64 word)
{
	return ((word & -word) * 0x0001020304050607ULL) >> 56;
}

/* The next slot from *at on to look at, or PYCOPY_NO_SLOT: none within this step, and
 * *at says where the next one goes on.
 */
static __always_inline u32 pycopy_next_slot(u32 *at, int all)
{
	if (all)
		return pycopy_next_kept(at);
#pragma clang loop unroll(disable)
	for (u64 i = 0; i < PYCOPY_EMPTY_GROUPS; i++) {
		u32 slot = PYCOPY_FRESH(*at), group = slot / PYCOPY_PENDING_SLOTS;
		struct pycopy_pending *pending = pycopy_lookup(PYCOPY_MAP_PENDING, &group);
		u32 first = slot % PYCOPY_PENDING_SLOTS;

		PYCOPY_PIN(i);
		if (!pending)
			break;
		/* A word at a time, from the slot at hand on. */
		for (int word = 0; word < PYCOPY_PENDING_SLOTS / 8; word++) {
			u64 bits = pending->words[word];

			if (first >= 8 * (word + 1))
				continue;
			if (first > 8 * word)
				bits &= ~0ULL << (8 * (first & 7));
			if (bits) {
				u32 byte = pycopy_lowest_byte(bits);

				((u8 *)&pending->words[word])[byte & 7] = 0;
				slot = group * PYCOPY_PENDING_SLOTS + 8 * word + byte;
				*at = slot + 1;
				return slot;
			}
		}
		*at = (group + 1) * PYCOPY_PENDING_SLOTS;
	}
	return PYCOPY_NO_SLOT;
}

/* Why the session needs user space now, or a number that is no reason.  The long limits
 * only where all sessions are looked at: as session.on_sweep().
 */
static __always_inline u16 pycopy_needs(const struct pycopy_session *s,
					const struct pycopy_fast_config *config, u64 now_ns,
					int all)
{
	u64 quiet_ns = PYCOPY_QUIET_ROUND_TRIPS * s->srtt_ns;
	u64 silent_ns = pycopy_since(s->progress_ns, now_ns);
	u64 unheard_ns = pycopy_since(s->client_ns, now_ns);

	if (pycopy_in_flight(s)) {
		if (now_ns >= s->rto_at)
			return PYCOPY_LEFT_TIMEOUT;
		if (all && silent_ns >= config->response_idle_ns &&
		    unheard_ns >= config->response_idle_ns)
			return PYCOPY_LEFT_SILENT;
		return PYCOPY_LEFT_REASONS;
	}
	if (s->held) {
		if (quiet_ns < config->quiet_ns)
			quiet_ns = config->quiet_ns;
		if (quiet_ns > config->quiet_max_ns)
			quiet_ns = config->quiet_max_ns;
		/* Not answered yet, or not greeted: for how long is the engine's to say. */
		if (s->known & PYCOPY_KNOWN_SENT ? s->rcv_nxt == s->answered
						 : s->rcv_nxt - s->irs == 1)
			return silent_ns >= config->quiet_max_ns ? PYCOPY_LEFT_SILENT
								 : PYCOPY_LEFT_REASONS;
		return silent_ns >= quiet_ns ? PYCOPY_LEFT_QUIET : PYCOPY_LEFT_REASONS;
	}
	if (all && unheard_ns >= config->idle_ns &&
	    (silent_ns >= config->idle_ns || s->state == PYCOPY_FIN_WAIT_2))
		return PYCOPY_LEFT_SILENT;
	return PYCOPY_LEFT_REASONS;
}

/* TIME_WAIT is over, unless another CPU's packet has ended it before. */
static __always_inline void pycopy_expire(struct pycopy_session *s, struct pycopy_work *work)
{
	u32 slot = work->flow.slot;

	work->key = s->target;
	if (!pycopy_free_lingering(s, &work->flow))
		return;
	pycopy_delete(PYCOPY_MAP_TARGETS, &work->key);
	pycopy_map_push(PYCOPY_MAP(PYCOPY_MAP_SLOTS), &slot, 0);
}

/* The one that lingers longest, if it is time: true if there may be more. */
static __always_inline int pycopy_expire_oldest(struct pycopy_work *work)
{
	struct pycopy_lingering oldest;
	struct pycopy_session *s;

	if (pycopy_map_peek(PYCOPY_MAP(PYCOPY_MAP_LINGERING), &oldest) ||
	    work->now_ns < oldest.until_ns ||
	    pycopy_map_pop(PYCOPY_MAP(PYCOPY_MAP_LINGERING), &oldest))
		return 0;
	work->flow.slot = oldest.slot;
	work->flow.generation = oldest.generation;
	s = pycopy_lookup(PYCOPY_MAP_SESSIONS, &work->flow.slot);
	if (s)
		pycopy_expire(s, work);
	return 1;
}

/* release.forgive(): from here on the target's shorter answer counts as the whole one.
 * Negative: it may only pause, and when a close leaves then is the engine's to say.
 */
static __always_inline int pycopy_forgive(struct pycopy_session *s, struct pycopy_work *work,
					  u64 *counts)
{
	u64 at = s->held_at;
	struct pycopy_log_record *record = pycopy_log_find(at);
	int forgiven = 0, doubt;
	s32 owed;

	if (!record)
		return 0;
	work->record = *record;
	bpf_spin_lock(&s->lock);
	owed = pycopy_owed(s, work->record.ack - s->online_irs);
	if (pycopy_is_ours(s, &work->flow) && s->held && owed > 0 && s->held_at == at) {
		doubt = owed >= s->smss ? PYCOPY_KNOWN_DOUBT : s->known & PYCOPY_KNOWN_DOUBT;
		if (doubt && work->record.tcp_flags & PYCOPY_TCP_FIN) {
			forgiven = -1;
		} else {
			s->known |= doubt;
			s->need_base += owed;
			forgiven = 1;
		}
	}
	bpf_spin_unlock(&s->lock);
	if (forgiven > 0)
		counts[PYCOPY_FAST_RELEASED_BY_QUIET]++;
	return forgiven;
}

/* Whether the session stays the kernel's, for now. */
static __always_inline void pycopy_judge(struct pycopy_session *s, struct pycopy_work *work,
					 struct pycopy_fast_config *config, u64 *counts, int all)
{
	u64 now_ns = work->now_ns;
	int left = 0, forgiven;
	u16 why;

	bpf_spin_lock(&s->lock);
	why = pycopy_needs(s, config, now_ns, all);
	if (why < PYCOPY_LEFT_REASONS && why != PYCOPY_LEFT_QUIET && pycopy_is_ours(s, &work->flow))
		left = pycopy_leave(s, why);
	bpf_spin_unlock(&s->lock);
	if (left) {
		pycopy_hand_over(s, &work->flow, counts);
	} else if (why == PYCOPY_LEFT_QUIET) {
		forgiven = pycopy_forgive(s, work, counts);
		if (forgiven < 0)
			pycopy_expel(s, &work->flow, counts, PYCOPY_LEFT_CLOSE);
		else if (!forgiven && pycopy_since(s->progress_ns, now_ns) >= config->quiet_max_ns)
			pycopy_expel(s, &work->flow, counts, why);
	}
}

/* What was seen (PYCOPY_TIMER_SEEN); zero: nothing is pending. */
static __always_inline u32 pycopy_look(struct __sk_buff *ctx, u32 slot, struct pycopy_work *work,
				       struct pycopy_fast_config *config, u64 *counts, int all)
{
	struct pycopy_session *s = pycopy_lookup(PYCOPY_MAP_SESSIONS, &slot);
	u64 now_ns = work->now_ns;
	struct pycopy_hop *hop;
	u32 service;

	if (!s || s->owner == PYCOPY_FREE || s->owner == PYCOPY_USER)
		return 0;
	work->flow.slot = slot;
	work->flow.generation = s->generation;
	if (s->owner == PYCOPY_KERNEL && s->state == PYCOPY_TIME_WAIT && now_ns >= s->rto_at) {
		pycopy_expire(s, work);
		return PYCOPY_TIMER_PENDING;
	}
	if (s->owner == PYCOPY_KERNEL && s->state != PYCOPY_TIME_WAIT)
		pycopy_judge(s, work, config, counts, all);
	if (s->owner == PYCOPY_LEAVING) {
		pycopy_call_attention(&work->flow);
		pycopy_watch(slot);
		return PYCOPY_TIMER_PENDING | PYCOPY_TIMER_ATTENTION;
	}
	service = s->service;
	hop = pycopy_lookup(PYCOPY_MAP_HOPS, &service);
	if (hop && hop->usable && (s->held || (s->ack_at && s->ack_at <= now_ns)) &&
	    pycopy_pump(ctx, s, work, hop, config, counts) == PYCOPY_GONE_OUT)
		bpf_clone_redirect(ctx, hop->ifindex, 0);
	if (!s->held && !s->ack_at && !pycopy_in_flight(s))
		return 0;
	pycopy_watch(slot);
	return s->held ? PYCOPY_TIMER_PENDING | PYCOPY_TIMER_HELD : PYCOPY_TIMER_PENDING;
}

/* One step of the pass that `mark` names: how it goes on. */
static __always_inline u32 pycopy_step(struct __sk_buff *ctx, u32 mark, u32 *seen)
{
	u32 all = mark == PYCOPY_TIMER_BEGIN_ALL || mark == PYCOPY_TIMER_GO_ON_ALL;
	u32 slot, slots = PYCOPY_CONSTANT(SLOTS), used_at = PYCOPY_CURSOR_USED;
	u32 *at = pycopy_lookup(PYCOPY_MAP_CURSORS, &all);
	u32 *used = pycopy_lookup(PYCOPY_MAP_CURSORS, &used_at);
	struct pycopy_fast_config *config = pycopy_config();
	struct pycopy_work *work = pycopy_work_of_cpu();
	u64 *counts = pycopy_fast_counts();

	if (!config || !counts || !work || !at || !used)
		return PYCOPY_TIMER_DONE;
	if (mark == PYCOPY_TIMER_BEGIN || mark == PYCOPY_TIMER_BEGIN_ALL) {
		*at = 0;
		mark += PYCOPY_TIMER_GO_ON - PYCOPY_TIMER_BEGIN;
	}
	work->now_ns = pycopy_now();
	if (pycopy_expire_oldest(work))
		return mark;
	work->flow.slot = pycopy_next_slot(at, all);
	slot = PYCOPY_FRESH(work->flow.slot);
	if (slot < slots && slot >= *used)
		*used = slot + 1;
	if (*at >= slots || (!all && *at >= *used + PYCOPY_SLOTS_AHEAD))
		mark = PYCOPY_TIMER_DONE;
	if (slot < slots) {
		ctx->mark = 0; /* what is sent from here is marked as nothing else is */
		*seen |= pycopy_look(ctx, slot, work, config, counts, all);
	}
	return mark;
}

int pycopy_timer(struct __sk_buff *ctx)
{
	u32 mark = ctx->mark & 0xff, seen = ctx->mark & PYCOPY_TIMER_SEEN;

	if (mark != PYCOPY_TIMER_DONE)
		mark = pycopy_step(ctx, mark, &seen);
	ctx->mark = mark | seen;
	return mark | seen;
}

/* So many slots at once: one by one, user space would need a quarter of a second for all. */
static __always_inline void pycopy_fill(u32 first)
{
	u32 slots = PYCOPY_CONSTANT(SLOTS), slot;

#pragma clang loop unroll(disable)
	for (u64 i = 0; i < PYCOPY_FILL_SLOTS; i++) {
		PYCOPY_PIN(i);
		slot = first + PYCOPY_FILL_SLOTS - 1 - i; /* the first one comes to lie on top */
		if (slot < slots)
			pycopy_map_push(PYCOPY_MAP(PYCOPY_MAP_SLOTS), &slot, 0);
	}
}

/* The command's session, behind the lock and the generation, which stay the slot's. */
#define PYCOPY_STATE_AT 8

/* What was asked for, if it was done, else 0. */
static __always_inline int pycopy_change_hands(struct pycopy_session *s,
					       struct pycopy_command *command)
{
	int done = 0;

	bpf_spin_lock(&s->lock);
	if (command->request == PYCOPY_TAKE && s->generation == command->generation &&
	    (s->owner == PYCOPY_KERNEL || s->owner == PYCOPY_LEAVING) &&
	    s->state != PYCOPY_TIME_WAIT) {
		if (s->owner == PYCOPY_KERNEL)
			pycopy_leave(s, PYCOPY_LEFT_ASKED);
		__builtin_memcpy(command->session + PYCOPY_STATE_AT, (void *)s + PYCOPY_STATE_AT,
				 sizeof(*s) - PYCOPY_STATE_AT);
		done = PYCOPY_TAKE;
	} else if (command->request == PYCOPY_HAVE && s->generation == command->generation &&
		   s->owner == PYCOPY_LEAVING) {
		s->owner = PYCOPY_USER;
		done = PYCOPY_HAVE;
	} else if (command->request == PYCOPY_GIVE && s->generation == command->generation &&
		   (s->owner == PYCOPY_USER || s->owner == PYCOPY_FREE)) {
		__builtin_memcpy((void *)s + PYCOPY_STATE_AT, command->session + PYCOPY_STATE_AT,
				 sizeof(*s) - PYCOPY_STATE_AT);
		s->owner = PYCOPY_KERNEL;
		done = PYCOPY_GIVE;
	} else if (command->request == PYCOPY_DROP && s->generation == command->generation &&
		   (s->owner == PYCOPY_USER ||
		    (s->owner == PYCOPY_KERNEL && s->state == PYCOPY_TIME_WAIT))) {
		s->owner = PYCOPY_FREE;
		s->generation++;
		done = PYCOPY_DROP;
	}
	bpf_spin_unlock(&s->lock);
	return done;
}

int pycopy_control(struct __sk_buff *ctx)
{
	void *data = (void *)(long)ctx->data, *data_end = (void *)(long)ctx->data_end;
	struct pycopy_command *command = data;
	u64 *counts = pycopy_fast_counts();
	struct pycopy_session *s;
	u32 slot;
	int done;

	if (data + sizeof(*command) > data_end || !counts)
		return 1;
	slot = command->slot;
	if (command->request == PYCOPY_FILL) {
		pycopy_fill(slot);
		return 0;
	}
	s = pycopy_lookup(PYCOPY_MAP_SESSIONS, &slot);
	if (!s)
		return 1;
	done = pycopy_change_hands(s, command);
	if (!done)
		return 1;
	if (done == PYCOPY_TAKE) {
		counts[PYCOPY_FAST_TAKEN]++;
		if (s->left == PYCOPY_LEFT_ASKED)
			counts[PYCOPY_FAST_LEFT + PYCOPY_LEFT_ASKED]++;
	} else if (done == PYCOPY_GIVE) {
		counts[PYCOPY_FAST_GIVEN]++;
		pycopy_watch(slot);
	} else if (done == PYCOPY_DROP) {
		pycopy_map_push(PYCOPY_MAP(PYCOPY_MAP_SLOTS), &slot, 0);
	}
	return 0;
}
