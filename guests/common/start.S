/* From the PVH entry (32-bit protected mode, paging off, EBX = start info) to C in long mode. */

#define CR0_PG 0x80000000
#define CR4_PAE 0x20
#define MSR_EFER 0xC0000080
#define EFER_LME 0x100
#define PTE_TABLE 0x07 /* present, writable, for ring 3 too: see run_in_ring3 */
#define PTE_2M 0x87
#define PTE_2M_UNCACHED 0x9F

#define KERNEL_CODE 0x08
#define KERNEL_DATA 0x10
#define USER_DATA 0x1B
#define USER_CODE 0x23
#define TASK 0x28
#define VECTORS 0x50
#define RFLAGS_IF_IOPL3 0x3202

    .section .text.start, "ax"
    .code32
    .globl pvh_start
pvh_start:
    cli
    cld
    movl $stack_top, %esp
    lgdt gdt_register
    movl $pml4, %eax
    movl %eax, %cr3
    movl %cr4, %eax
    orl $CR4_PAE, %eax
    movl %eax, %cr4
    movl $MSR_EFER, %ecx
    rdmsr
    orl $EFER_LME, %eax
    wrmsr
    movl %cr0, %eax
    orl $CR0_PG, %eax
    movl %eax, %cr0
    ljmp $KERNEL_CODE, $long_mode

    .code64
long_mode:
    movl $KERNEL_DATA, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    xorl %eax, %eax
    movl %eax, %fs
    movl %eax, %gs
    /* A TSS holds the stack for traps from ring 3; the descriptor has its address in four pieces. */
    movl $tss, %eax
    movw %ax, gdt_task + 2
    shrl $16, %eax
    movb %al, gdt_task + 4
    movb %ah, gdt_task + 7
    movl $TASK, %eax
    ltr %ax
    xorl %ebp, %ebp
    movl %ebx, %edi
    call guest_start

    .text
    .globl run_in_ring3
run_in_ring3:
    pushq $USER_DATA
    pushq $ring3_stack_top
    pushq $RFLAGS_IF_IOPL3
    pushq $USER_CODE
    pushq %rdi
    iretq

/* One stub for each vector, 16 bytes apart.  All push the same frame, with an error code of 0 if the processor pushes
 * none. */
    .balign 16
    .globl trap_stubs
trap_stubs:
    .set vector, 0
    .rept VECTORS
    .balign 16
    .if !(vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21 || vector == 29 || vector == 30)
    pushq $0
    .endif
    pushq $vector
    jmp trap_common
    .set vector, vector + 1
    .endr

trap_common:
    pushq %rax
    pushq %rbx
    pushq %rcx
    pushq %rdx
    pushq %rsi
    pushq %rdi
    pushq %rbp
    pushq %r8
    pushq %r9
    pushq %r10
    pushq %r11
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    cld
    movq %rsp, %rdi
    call trap
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %r11
    popq %r10
    popq %r9
    popq %r8
    popq %rbp
    popq %rdi
    popq %rsi
    popq %rdx
    popq %rcx
    popq %rbx
    popq %rax
    addq $16, %rsp
    iretq

    .data
    .balign 8
gdt:
    .quad 0
    .quad 0x00AF9B000000FFFF /* 08: ring 0 code, 64 bits */
    .quad 0x00CF93000000FFFF /* 10: ring 0 data */
    .quad 0x00CFF3000000FFFF /* 18: ring 3 data */
    .quad 0x00AFFB000000FFFF /* 20: ring 3 code, 64 bits */
gdt_task:
    .quad 0x0000890000002068 /* 28: TSS, address filled in above; the upper half of it is 0 */
    .quad 0
    .quad 0x00CF9B000000FFFF /* 38: ring 0 code, 32 bits, for processors that start */
gdt_end:
    .globl gdt, gdt_register
gdt_register:
    .word gdt_end - gdt - 1
    .quad gdt

    .balign 16
tss:
    .long 0
    .quad stack_top
    .fill 23, 4, 0
    .word 0, 104 /* An I/O bitmap that allows every port follows, with its final byte of ones, */
    .fill 8192, 1, 0 /* because a software KVM ignores the IOPL of ring 3. */
    .byte 0xFF

/* The assembler makes the page tables, because filling them would take a slow KVM about 20 ms.  They map 4 GiB to the
 * same physical addresses.  The last 512 MiB, where only devices are, are uncached. */
    .balign 4096
    .globl pml4, pdpt
pml4:
    .quad pdpt + PTE_TABLE
    .fill 511, 8, 0
pdpt:
    .set gib, 0
    .rept 4
    .quad page_directories + gib * 4096 + PTE_TABLE
    .set gib, gib + 1
    .endr
    .fill 508, 8, 0
page_directories:
    .set address, 0
    .rept 1792
    .quad address + PTE_2M
    .set address, address + 0x200000
    .endr
    .rept 256
    .quad address + PTE_2M_UNCACHED
    .set address, address + 0x200000
    .endr

    .bss
    .balign 16
    .skip 16384
stack_top:
    .skip 8192
ring3_stack_top:

    .section .note.GNU-stack, "", @progbits
